"""How a server begins and ends, who may come in, and clients that leave or wait."""

import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import threading
import time
from http.client import HTTPConnection

import forked
import pytest
import servers
from conftest import ROOT, on_gpu
from servers import JSON, httpx, openai, server, serving, wait, web

import sample
import serve
from engine import guard
from engine.batching import Request

run, served = servers.run, servers.served


def test_a_client_that_hangs_up_frees_its_slot(served, monkeypatch):
    served.slowly(monkeypatch, 0.03)
    body = dict(prompt="a", max_tokens=100, n=4, temperature=0)  # none ends by chance
    lengths = served.engine.counts["length"]
    for stream in (True, False):
        before = served.engine.counts["abort"]
        connection = HTTPConnection("127.0.0.1", served.port)
        connection.request("POST", "/v1/completions", json.dumps(body | dict(stream=stream)), JSON)
        wait(lambda: served.engine.slots.writing)
        if stream:
            assert connection.getresponse().read(20)
        connection.sock.shutdown(socket.SHUT_RDWR)
        connection.close()
        wait(lambda: not served.engine.number_running(), 1.5)  # 100 tokens would take three seconds
        wait(lambda before=before: served.engine.counts["abort"] == before + 4)
    # also at any other moment, and from Python 3.12 back
    monkeypatch.undo()
    rng = random.Random(0)
    for i in range(40):
        connection = HTTPConnection("127.0.0.1", served.port)
        connection.request(
            "POST", "/v1/completions", json.dumps(body | dict(stream=i % 2 == 0)), JSON
        )
        time.sleep(rng.random() * 0.02)
        connection.close()
    wait(lambda: not served.server.asked and not served.engine.number_running(), 5)
    assert served.engine.counts["length"] - lengths < 40 * 4  # not all were written to their end
    served.slowly(monkeypatch, 0.03)
    # also one that has not got its turn
    holding = [HTTPConnection("127.0.0.1", served.port) for _ in range(3)]
    for connection in holding:
        connection.request("POST", "/v1/completions", json.dumps(body | dict(n=8)), JSON)
    wait(lambda: served.engine.number_waiting() == 16)
    for connection in holding[1:]:
        connection.close()
    wait(lambda: not served.engine.number_waiting(), 1.5)
    assert served.engine.number_running() == 8  # the first goes on
    holding[0].close()
    wait(lambda: not served.engine.number_running(), 1.5)


def test_a_stream_whose_client_is_gone_before_its_first_event_is_given_up():
    async def gone_at_once():
        request = Request([1], 1, 1, 0, {}, list, list)

        async def events():
            yield "never"

        async def broken(*_):
            raise OSError("the client is gone")

        with contextlib.suppress(BaseException):
            await server.Stream(events(), [request])({"type": "http"}, broken, broken)
        return request.gone

    assert asyncio.run(gone_at_once())


def test_a_full_line_is_429_and_the_official_client_comes_back(run, monkeypatch):
    with serving(run, slots=1, queue=1) as running:
        step, go_on = running.engine.step, threading.Event()
        monkeypatch.setattr(running.engine, "step", lambda: (go_on.wait(20), step()))
        monkeypatch.setitem(server.HEADERS, 429, {"Retry-After": "0.1"})
        body, ends = dict(prompt="a", max_tokens=60), []
        target = lambda: ends.append(running.post("/v1/completions", body))  # noqa: E731
        threading.Thread(target=target).start()
        wait(running.engine.number_waiting)
        refused = running.post("/v1/completions", body)
        assert refused.status_code == 429 and refused.headers["retry-after"] == "0.1"
        assert refused.json()["error"]["code"] == "queue_full"
        threading.Timer(0.3, go_on.set).start()
        text = running.client(max_retries=50).completions.create(model="tiny", **body)
        assert text.choices[0].finish_reason in ("length", "stop")  # an end by chance, too
        wait(lambda: [end.status_code for end in ends] == [200])


def test_a_deadline(run, monkeypatch):
    with serving(run, timeout=0.2) as running:
        running.slowly(monkeypatch, 0.05)
        body = dict(prompt="a", max_tokens=100)
        assert running.post("/v1/completions", body).status_code == 408
        streamed = running.post("/v1/completions", body | dict(stream=True))
        assert '"error"' in streamed.text and "[DONE]" not in streamed.text


def test_a_gpu_serves_what_it_says_without_a_server(run, capsys):
    if not on_gpu():
        pytest.skip("for --device=cuda")
    same = ["--max_tokens=40", "--temperature=0", "--dtype=float32", "--device=cuda"]
    sample.main([str(run), "--prompt=the model", *same])
    said = capsys.readouterr().out
    body = dict(prompt="the model", max_tokens=40, temperature=0)
    with serving(run, device="cuda", dtype="float32") as running:
        answers = [running.post("/v1/completions", body).json() for _ in range(2)]
    for answer in answers:
        assert ("the model" + answer["choices"][0]["text"]).rstrip("\n") == said.rstrip("\n")


def start(run, *argv):
    process = forked.Forked("serve.py", run, "--port=0", "--device=cpu", *argv)
    for line in process.stdout:
        if line.startswith("serving on "):
            return process, line.split()[2]
    raise AssertionError(process.wait())


def test_sigterm_lets_running_answers_end(run):
    process, url = start(run)
    with web.stream(
        "POST", f"{url}/v1/completions", json=dict(prompt="a", max_tokens=100, stream=True, n=8)
    ) as answer:
        lines = answer.iter_lines()
        next(lines)
        process.send_signal(signal.SIGTERM)
        wait(lambda: web.get(f"{url}/health").status_code == 503, 5)
        late = web.post(f"{url}/v1/completions", json=dict(prompt="a"))
        assert late.status_code == 503 and late.json()["error"]["message"]
        rest = [*lines]
    assert "data: [DONE]" in rest
    assert process.wait(10) == 0


@pytest.mark.parametrize("signals", [1, 2])
def test_a_drain_has_an_end_and_a_second_ctrl_c_is_obeyed(run, signals):
    process, url = start(run, "--drain=0.3" if signals == 1 else "--drain=60", "--slots=1")
    body = json.dumps(dict(prompt="a", max_tokens=100, stream=True, logprobs=20))
    connections = [HTTPConnection(url.split("//")[1]) for _ in range(40)]
    for connection in connections:
        connection.request("POST", "/v1/completions", body, JSON)
    connections[0].getresponse()  # the first is being answered, and the others wait
    for _ in range(signals):
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
    assert process.wait(10) == 0
    assert "Traceback" not in process.stdout.read()


@pytest.mark.parametrize(
    "argv, complaint",
    [
        (["--host=0.0.0.0"], "key_file='' should be given for an address that others can reach"),
        (["--key_file=none.txt"], "key_file='none.txt' should be a file that exists"),
        (["--new_key"], "key_file='' should be"),
        (["--certificate=README.md"], "certificate_key='' should be given beside certificate"),
        (["--certificate=LICENSE", "--certificate_key=LICENSE"], "do not make a pair in PEM"),
        (["--filtered=mask"], "filtered='mask' should be stop without a --filter"),
        (["--name=a:b"], "name='a:b' should be without : and spaces"),
        (["--slots=0"], "slots=0 should be at least 1"),
        (["--key_file=LICENSE"], "LICENSE, line 1: not the sha256 of a key"),
        (["no/such/run"], "no such folder"),
    ],
)
def test_a_mistake_is_one_sentence(argv, complaint, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(ValueError, match=complaint):
        serve.main(["--port=0", *argv])


def test_a_port_in_use_is_said_before_anything_is_loaded(served):
    with pytest.raises(ValueError, match=f"127.0.0.1:{served.port} cannot be listened on"):
        serve.main([f"--port={served.port}", "no/such/run"])


def test_the_event_loop_does_not_wait_for_the_model(served, monkeypatch):
    served.slowly(monkeypatch, 1.0)
    with web.stream("POST", f"{served.url}/v1/completions", json=dict(prompt="a", stream=True)):
        start = time.monotonic()
        assert web.get(f"{served.url}/health").status_code == 200
        assert time.monotonic() - start < 0.9


def test_over_tls(run, tmp_path):
    x509 = pytest.importorskip("cryptography.x509")
    import datetime
    import ssl

    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    day = datetime.timedelta(days=1)
    now = datetime.datetime.now(datetime.timezone.utc)
    made = x509.CertificateBuilder(name, name, key.public_key(), 1, now - day, now + day)
    made = made.add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), False)
    files = tmp_path / "cert.pem", tmp_path / "key.pem"
    encoding = serialization.Encoding.PEM
    files[0].write_bytes(made.sign(key, hashes.SHA256()).public_bytes(encoding))
    plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    files[1].write_bytes(key.private_bytes(encoding, *plain))
    with serving(run, certificate=str(files[0]), certificate_key=str(files[1])) as running:
        context = ssl.create_default_context(cafile=str(files[0]))
        found = httpx.get(f"https://localhost:{running.port}/v1/models", verify=context)
        assert found.json()["data"][0]["id"] == "tiny"


def test_keys_are_needed_everywhere_but_for_health_and_the_page(run, tmp_path, capsys):
    file = tmp_path / "keys.txt"
    assert serve.main(["--new_key", f"--key_file={file}"]) == 0
    key = capsys.readouterr().out.split()[0]
    assert key not in file.read_text() and os.stat(file).st_mode & 0o077 == 0
    with serving(run, keys=guard.read_keys(str(file))) as running:
        for path in ("/v1/models", "/metrics", "/inspect/run", "/v1", "/no/such", "//health"):
            assert web.get(running.url + path).status_code == 401, path
        for path in ("/", "/health"):
            assert web.get(running.url + path).status_code == 200
        for wrong in (
            "Bearer",
            "Bearer x",
            f"Basic {key}",
            f"Bearer {key}x",
            "Bearer ключ".encode(),
        ):
            headers = {"Authorization": wrong}
            assert web.get(running.url + "/v1/models", headers=headers).status_code == 401
        assert [m.id for m in running.client(key).models.list()] == ["tiny"]
        with pytest.raises(openai.AuthenticationError):
            running.client("wrong", max_retries=0).models.list()
        for path in ("/inspect/next", "/inspect/attention", "/v1/chat/completions"):
            assert running.post(path, dict(prompt="a")).status_code == 401
        refused = running.post("/v1/completions", b"x" * 100_000)
        assert refused.status_code == 401 and refused.json()["error"]["code"] == "invalid_api_key"
