"""Nothing is downloaded and nothing phones home: the same runs, with no network at all."""

import subprocess
import sys

import pytest
import tiny

# Runs a script in a network namespace of its own, where not even the loopback device is up.
ALONE = ["unshare", "--map-root-user", "--net"]


def isolation() -> str:
    """Why this machine gives no namespace without a network; empty where it does."""
    try:
        done = subprocess.run([*ALONE, "true"], capture_output=True, text=True, timeout=20)
    except OSError as error:
        return str(error)
    return "" if done.returncode == 0 else done.stderr.strip() or "unshare failed"


REFUSED = isolation()
alone = pytest.mark.skipif(bool(REFUSED), reason=f"no network namespace here: {REFUSED}")

# What a run may not do even where a network is there: name a host, or connect beyond this machine.
WATCH = """
import socket, sys
asked = []

def local(address):
    return not isinstance(address, tuple) or address[0] in ("127.0.0.1", "::1", "localhost")

def watched(name, call):
    def instead(self, address, *rest):
        if not local(address):
            asked.append((name, address))
        return call(self, address, *rest)
    return instead

for name in ("connect", "connect_ex"):
    setattr(socket.socket, name, watched(name, getattr(socket.socket, name)))
find = socket.getaddrinfo

def named(host, *rest, **more):
    if host not in (None, "127.0.0.1", "::1", "localhost"):
        asked.append(("getaddrinfo", host))
    return find(host, *rest, **more)

socket.getaddrinfo = named
"""
RUN = "from fedsec import run\nstatus = run.main(sys.argv[1:])\n"
REPORT = "from fedsec import report\nstatus = status or report.main(['out'])\n"
END = "print(asked, file=sys.stderr) if asked else None\nsys.exit(status)\n"


def python(cwd, script: str, words: list[str], first: tuple[str, ...] = ()) -> None:
    """The script must end well, with nothing on stderr."""
    done = subprocess.run([*first, sys.executable, "-c", script, *words], cwd=cwd, env=tiny.ENV,
                          capture_output=True, text=True, timeout=120)  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


DEFAULT = [*tiny.SMALL, "attack.steps=2", "data.per_class=8", "defense=dpsgd", "out=out"]


@alone
def test_the_namespace_has_no_network():
    script = "import socket; socket.create_connection(('1.1.1.1', 53), 5)"
    done = subprocess.run([*ALONE, sys.executable, "-c", script], capture_output=True, timeout=20)
    assert b"Network is unreachable" in done.stderr


@alone
def test_a_default_run_and_its_report_need_no_network(tmp_path):
    """Photos, LPIPS, both accountants, the page; Flower, Opacus and torch are all imported."""
    python(tmp_path, WATCH + RUN + REPORT + END, DEFAULT, tuple(ALONE))
    rows = tiny.rows(tmp_path / "out")
    assert len(rows) == 8
    assert all(row["lpips"] > 0 for row in rows)
    assert tiny.whole(tmp_path / "out")["privacy"]["epsilon"] > 0
    assert "http" not in page_addresses((tmp_path / "out/report.html").read_text())


def page_addresses(page: str) -> str:
    """What a browser would fetch for the page."""
    import re

    return " ".join(re.findall(r"(?:src|href|url\()\s*=?\s*[\"']?([^\"')\s>]{4})", page))


def test_the_watch_sees_a_connection(tmp_path):
    script = WATCH + (
        "import urllib.request\n"
        "try:\n    urllib.request.urlopen('http://fedsec.invalid', timeout=5)\n"
        "except OSError:\n    pass\n"
        "assert asked, 'it saw nothing'\n"
    )
    python(tmp_path, script, [])


@pytest.mark.slow
def test_a_run_asks_for_no_connection_where_there_is_a_network(tmp_path):
    python(tmp_path, WATCH + RUN + END, [*DEFAULT, "client=fedavg", "defense=[prune,noise]"])
    assert len(tiny.rows(tmp_path / "out")) == 8


@alone
@pytest.mark.parametrize("words", [["--help"], ["--hydra-help"], ["--cfg", "job"]])
def test_help_needs_no_network(tmp_path, words):
    line = [*ALONE, sys.executable, "-m", "fedsec.run", *words]
    done = subprocess.run(line, cwd=tmp_path, env=tiny.ENV, capture_output=True, text=True,
                          timeout=60)  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert "threat" in done.stdout or words == ["--hydra-help"]
