"""Locked weights open with the passphrase alone, to the byte; signed ones are what was signed."""

import errno
import json
import os
import re
import resource
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY
from mistakes import check_mistake, contents

from engine import locked, signatures
from engine.checkpoint import load_model
from engine.learner import opened

pyrage = pytest.importorskip("pyrage")
pytest.importorskip("cryptography")
import train as trainer  # noqa: E402
import weights  # noqa: E402

SECRET = "correct horse 电池"
OPEN = "--passphrase_file=secret.txt"
SHORT = ["--steps=4", "--eval_every=2", "--save_every=2"]  # two checkpoints


def trained(folder: Path, data: Path, *argv: str) -> Path:
    (folder.parent / "empty.py").write_text("")
    config = str(folder.parent / "empty.py")
    assert trainer.main([config, f"--data={data}", f"--out={folder}", *TINY, *argv]) == 0
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory, data) -> Path:
    """Runs: run/, which has heads; tuned/, which has a base; and locked/, which is run/, locked."""
    folder = tmp_path_factory.mktemp("world")
    run = trained(folder / "run", data, "--objective=replaced", *SHORT)
    trained(folder / "tuned", data, f"--init_from={run}", "--lora_rank=2", *SHORT)
    shutil.copytree(run, folder / "locked")
    locked.lock(folder / "locked", SECRET)
    (folder / "secret.txt").write_text(SECRET + "\n", encoding="utf-8")
    (folder / "wrong.txt").write_text("incorrect horse")
    weights.main(["keys", str(folder / "me")])
    weights.main(["keys", str(folder / "other")])
    return folder


@pytest.fixture
def place(world, tmp_path, monkeypatch) -> Path:
    """A copy of the world, and the current folder for one test."""
    shutil.copytree(world, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    monkeypatch.setattr(locked, "OPENED", {})
    return tmp_path / "place"


def with_key(run: str) -> str:
    """A run, with the key of locked/, as `lock` leaves it if it is stopped early: another key
    would take seconds."""
    shutil.copy("locked/key.age", run)
    return run


# --- locked


@pytest.mark.parametrize("run", ["run", "tuned"])
def test_locked_and_unlocked_all_is_as_it_was_to_the_byte(place, run, capsys):
    before = contents(Path(run))
    weights.main(["lock", with_key(run), OPEN])
    after = contents(Path(run))
    tensors = {name for name in before if name.endswith(".safetensors")}
    assert {Path(name).stem for name in tensors} >= {
        "optimizer",
        "heads" if run == "run" else "base",
    }
    assert after.keys() == before.keys() - tensors | {n + ".age" for n in tensors} | {"key.age"}
    assert all(after[name] == before[name] for name in before.keys() - tensors)
    weights.main(["unlock", run, OPEN])
    assert contents(Path(run)) == before
    assert f"{run} is unlocked (files of weights: {len(tensors)})" in capsys.readouterr().out


def windows(content: bytes) -> np.ndarray:
    """All runs of eight bytes, as numbers."""
    runs = np.lib.stride_tricks.sliding_window_view(np.frombuffer(content, np.uint8), 8)
    return np.ascontiguousarray(runs).view(np.uint64).ravel()


def test_no_sixteen_bytes_of_a_tensor_stand_in_a_locked_run(place):
    found = []
    for path in Path("run").rglob("*.safetensors"):
        content = path.read_bytes()
        found.append(windows(content[8 + int.from_bytes(content[:8], "little") :])[::8])
    found = np.unique(np.concatenate(found))
    assert len(found) > 10_000
    for name, content in contents(Path("locked")).items():
        if content and len(content) >= 8:
            there = windows(content)
            nearest = found[np.searchsorted(found, there).clip(max=len(found) - 1)]
            assert not (nearest == there).any(), name


def test_it_is_the_format_of_age(place):
    """By pyrage, as `age -d -i key.age FILE` reads it, and not by way of our code."""
    secret = pyrage.passphrase.decrypt(Path("locked/key.age").read_bytes(), SECRET).decode()
    assert secret.startswith("AGE-SECRET-KEY-1")
    key = pyrage.x25519.Identity.from_str(secret)
    name = "step-00000004/model.safetensors"
    sealed = Path("locked", f"{name}.age").read_bytes()
    assert sealed.startswith(b"age-encryption.org/v1\n-> X25519 ")
    assert pyrage.decrypt(sealed, [key]) == Path("run", name).read_bytes()


@pytest.mark.parametrize("run", ["run", "tuned"])
def test_a_locked_model_opens_in_memory_as_the_same_model(place, run, capsys):
    expected, _ = load_model(run)
    heads = opened(run, "replaced")[0].heads.state_dict() if run == "run" else {}
    weights.main(["lock", with_key(run), OPEN])
    before = contents(place)
    model, _ = load_model(run, passphrase_file="secret.txt")
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    if heads:
        again = opened(run, "replaced")[0].heads.state_dict()
        assert all(torch.equal(again[name], tensor) for name, tensor in heads.items())
    assert contents(place) == before


def test_locked_weights_are_opened_without_a_write_to_any_file(place):
    """Not of one byte: the kernel forbids it."""
    weights.main(["lock", with_key("tuned"), OPEN])
    child = os.fork()
    if not child:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        try:
            load_model("tuned", passphrase_file="secret.txt")
            Path("a file").write_text("one letter")
        except OSError as e:
            os._exit(e.errno)  # of the second line
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == errno.EFBIG


def test_a_locked_file_of_another_step_is_refused(place):
    name = "model.safetensors.age"
    shutil.copy(f"locked/step-00000002/{name}", f"locked/step-00000004/{name}")
    with pytest.raises(ValueError, match=r"model.safetensors.age is not what belongs here"):
        load_model("locked", "4", passphrase_file="secret.txt")


def test_weights_that_someone_puts_into_a_locked_run_are_never_used(place):
    """In plain text, with a manifest that suits: beside the locked ones, or in their place."""
    step = Path("locked/step-00000004")
    expected, _ = load_model("run", "4")
    shutil.copy("run/step-00000002/model.safetensors", step)
    model, _ = load_model("locked", "4", passphrase_file="secret.txt")
    assert torch.equal(model.wte.weight, expected.wte.weight)
    with pytest.raises(ValueError, match=r"model.safetensors.age is another file"):
        weights.main(["lock", "locked", OPEN])
    manifest = json.loads((step / "manifest.json").read_text())
    other = json.loads(Path("run/step-00000002/manifest.json").read_text())
    manifest["model.safetensors"] = other["model.safetensors"]
    (step / "manifest.json").write_text(json.dumps(manifest))
    (step / "model.safetensors.age").unlink()
    with pytest.raises(ValueError, match=r"model.safetensors.age is missing"):
        load_model("locked", "4", passphrase_file="secret.txt")


@pytest.fixture(scope="module")
def sealed(tmp_path_factory):
    """A key, and a locked file of three chunks."""
    folder = tmp_path_factory.mktemp("sealed")
    key = pyrage.x25519.Identity.generate()
    (folder / "plain").write_bytes(os.urandom(150_000))
    with open(folder / "locked", "wb") as f:
        sink = locked.Sink(f)
        locked.through("encrypt", folder / "plain", sink, key.to_public())
    assert opens(folder / "locked", key) is None
    return (folder / "locked").read_bytes(), key


def opens(path: Path, key) -> str | None:
    """None, or why it does not open."""
    try:
        locked.through("decrypt", path, locked.Sink(), key)
    except ValueError as e:
        return str(e)


def test_each_flipped_byte_and_each_cut_is_noticed(sealed, tmp_path):
    content, key = sealed
    path = tmp_path / "spoiled"
    for i in [*range(0, 300, 2), *range(300, len(content), 2003), len(content) - 1]:
        path.write_bytes(content[:i] + bytes([content[i] ^ 1]) + content[i + 1 :])
        assert "is damaged" in opens(path, key), f"byte {i}"
        path.write_bytes(content[:i])
        assert "is damaged" in opens(path, key), f"{i} bytes"
    path.write_bytes(content + b"\0")
    assert "is damaged" in opens(path, key)
    start = len(content) - (150_000 + 3 * 16)  # of the first chunk; two of them change places
    one, two = (content[start + i * 65_552 :][:65_552] for i in (0, 1))
    path.write_bytes(content[:start] + two + one + content[start + 2 * 65_552 :])
    assert "is damaged" in opens(path, key)


@pytest.mark.parametrize("damage", ["flipped", "cut", "removed"])
def test_damaged_weights_are_named_and_never_used(place, damage, monkeypatch, capsys):
    path = Path("locked/step-00000004/model.safetensors.age")
    content = path.read_bytes()
    spoiled = {
        "flipped": content[:-9] + bytes([content[-9] ^ 1]) + content[-8:],
        "cut": content[:-1],
    }
    path.write_bytes(spoiled[damage]) if damage in spoiled else path.unlink()
    argv = ["locked", "--checkpoint=4", OPEN]
    check_mistake("sample", argv, ["model.safetensors", "damaged"], monkeypatch, capsys)
    if damage in spoiled:
        with pytest.raises(ValueError, match=r"model.safetensors.age is damaged"):
            weights.main(["unlock", "locked", OPEN])
        assert not [*path.parent.glob("model.safetensors*[!e]")]  # and nothing half done


def test_memory_does_not_grow_with_the_file(tmp_path):
    """Locked and unlocked, a file of 64 MB costs less than 12."""
    with open(tmp_path / "large", "wb") as f:
        f.truncate(64 << 20)
    code = """
import pyrage, resource, sys
from pathlib import Path
from engine import files, locked
key = pyrage.x25519.Identity.generate()
def through(what, a, b, key):
    with open(b, "wb") as f:
        locked.through(what, Path(a), locked.Sink(f), key)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
small = through("encrypt", "small", "small.age", key.to_public())
through("encrypt", "large", "large.age", key.to_public())
print(small, through("decrypt", "large.age", "/dev/null", key))
"""
    (tmp_path / "small").write_bytes(b"x" * 1000)
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    out = subprocess.check_output([sys.executable, "-c", code], cwd=tmp_path, env=env, text=True)
    small, large = map(int, out.split())
    assert large - small < 12, out


# --- interrupted


def killed(work, at: int) -> bool:
    """Does `work` in a copy of this process, which is killed before its durable call number `at`;
    returns whether it came so far."""
    child = os.fork()
    if not child:
        count = iter(range(1_000))

        def dying(call):
            def instead(*args, **options):
                if next(count) == at:
                    os._exit(9)
                return call(*args, **options)

            return instead

        os.fsync = dying(os.fsync)
        Path.unlink, Path.replace = dying(Path.unlink), dying(Path.replace)
        work()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.mark.parametrize("command", [locked.lock, locked.unlock])
@pytest.mark.parametrize("then", [locked.lock, locked.unlock])
def test_killed_at_any_moment_it_loses_nothing_and_goes_on(place, command, then):
    for folder in ("run", "locked"):  # two files, to be faster
        shutil.rmtree(f"{folder}/step-00000002")
        next(Path(folder).glob("*/optimizer*")).unlink()
    plain = contents(Path("run"))
    locked.key_in(Path("locked/key.age").read_bytes(), SECRET)  # once, for all copies
    for at in range(1_000):
        shutil.rmtree("now", ignore_errors=True)
        shutil.copytree("run" if command is locked.lock else "locked", "now")
        if command is locked.lock:
            with_key("now")
        if not killed(lambda: command(Path("now"), SECRET), at):
            break
        if command is locked.unlock and not Path("now/key.age").exists():
            assert contents(Path("now")) == plain
            continue
        then(Path("now"), SECRET)
        names = contents(Path("now"))
        if then is locked.lock:
            assert not [n for n in names if n.endswith((".safetensors", ".partial"))], at
            locked.unlock(Path("now"), SECRET)
        assert contents(Path("now")) == plain, at
    assert at > 9


def test_an_error_of_the_disk_and_a_ctrl_c_stay_what_they_are(place, sealed, tmp_path):
    content, key = sealed
    (tmp_path / "locked").write_bytes(content)
    for error in (OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()):

        class Full:
            def write(self, piece, error=error):
                raise error

        for what, half in (("encrypt", key.to_public()), ("decrypt", key)):
            with pytest.raises(type(error)) as raised:
                locked.through(what, tmp_path / "locked", locked.Sink(Full()), half)
            assert raised.value is error


def test_what_an_interrupted_save_has_left_is_locked_as_well(place):
    part = Path("run/step-00000008.partial/step-00000008")
    part.mkdir(parents=True)
    shutil.copy("run/step-00000004/model.safetensors", part)
    shutil.copytree("run/step-00000004", "run/step-00000004.corrupt")
    locked.lock(Path(with_key("run")), SECRET)
    assert not [*Path("run").rglob("*.safetensors")]


# --- mistakes


def link_weights(place):
    path = Path("run/step-00000004/model.safetensors")
    path.rename("elsewhere.safetensors")
    path.symlink_to(Path("elsewhere.safetensors").absolute())


def lose_key(place):
    Path("locked/key.age").unlink()


def spoil_key(place):
    Path("locked/key.age").write_bytes(Path("locked/key.age").read_bytes()[1:])


def other_key(place):
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key

    key = generate_private_key(SECP256R1())
    options = form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption()
    Path("ec.key").write_bytes(key.private_bytes(*options))


def secrets(place):
    Path("empty.txt").write_text("\n")
    Path("two.txt").write_text("one\ntwo\n")
    Path("latin.txt").write_bytes("schön".encode("latin-1"))


def key_inside(place):
    shutil.copy("me.pub", "run")
    shutil.copy("me.key", "run")


TRAIN = ["empty.py", "--data=DATA", "--out=locked", *TINY]
MISTAKES = [
    ("weights", [], ["say what to do"]),
    ("weights", ["lock"], ["say what to do"]),
    ("weights", ["lock", "run", "tuned", OPEN], ["say what to do"]),
    ("weights", ["seal", "run"], ["say what to do"]),
    ("weights", ["lock", "nowhere", OPEN], ["nowhere"]),
    ("weights", ["lock", "run/step-00000004", OPEN], ["part of a run"]),
    ("weights", ["lock", ".", OPEN], ["holds no checkpoint"]),
    ("weights", ["unlock", "run", OPEN], ["run is not locked"]),
    ("weights", ["lock", "run"], ["--passphrase_file"]),
    ("weights", ["lock", "run", "--passphrase_file=none.txt"], ["none.txt"]),
    ("weights", ["lock", "run", "--passphrase_file=empty.txt"], ["empty.txt", "one line"], secrets),
    ("weights", ["lock", "run", "--passphrase_file=two.txt"], ["two.txt", "one line"], secrets),
    ("weights", ["lock", "run", "--passphrase_file=latin.txt"], ["latin.txt", "UTF-8"], secrets),
    ("weights", ["lock", "run", OPEN, "--key=me.key"], ["key='me.key'"]),
    ("weights", ["lock", "run", OPEN], ["is a link"], link_weights),
    ("weights", ["unlock", "locked", "--passphrase_file=wrong.txt"], ["the passphrase", "wrong"]),
    ("weights", ["unlock", "locked", OPEN], ["key.age", "wrong"], spoil_key),
    ("sample", ["locked"], ["--passphrase_file"]),
    ("sample", ["locked/step-00000004"], ["--passphrase_file"]),
    ("sample", ["locked", "--passphrase_file=wrong.txt"], ["the passphrase", "wrong"]),
    ("sample", ["run", OPEN], ["nothing is locked"]),
    ("sample", ["locked"], ["key.age", "bring it back"], lose_key),
    ("evaluate", ["locked"], ["--passphrase_file"]),
    ("evaluate", ["run", "--baseline=locked"], ["locked is locked"]),
    ("huggingface", ["export", "locked", "hf"], ["weights.py unlock", "locked`"]),
    ("train", TRAIN, ["weights.py unlock", "locked`"]),
    ("train", TRAIN, ["key.age", "bring it back"], lose_key),
    ("train", ["empty.py", "--data=DATA", "--out=new", "--init_from=locked", *TINY], ["unlock"]),
    ("weights", ["keys", "me"], ["me.key exists"]),
    ("weights", ["keys", "nowhere/me"], ["nowhere/me.key"]),
    ("weights", ["sign", "run"], ["key=''"]),
    ("weights", ["sign", "run", "--key=me.key", OPEN], ["passphrase_file='secret.txt'"]),
    ("weights", ["sign", "run", "--key=me.pub"], ["me.pub is no private"]),
    ("weights", ["sign", "run", "--key=ec.key"], ["ec.key is no private"], other_key),
    ("weights", ["sign", "nowhere", "--key=me.key"], ["no such folder"]),
    ("weights", ["sign", "run", "--key=run/me.key"], ["keep it elsewhere"], key_inside),
    ("weights", ["verify", "run", "--key=run/me.pub"], ["keep it elsewhere"], key_inside),
    ("weights", ["verify", "run", "--key=me.key"], ["me.key is no public"]),
    ("weights", ["verify", "run", "--key=none.pub"], ["none.pub"]),
    ("weights", ["verify", "run", "--key=me.pub"], ["run is not signed"]),
]


@pytest.mark.parametrize("case", MISTAKES, ids=lambda case: " ".join([case[0], *case[1][:3]]))
def test_a_mistake_costs_one_sentence(world, data, case, request, monkeypatch, capsys):
    script, argv, named, *ready = case
    if ready:
        ready[0](request.getfixturevalue("place"))
    else:
        monkeypatch.chdir(world)  # where nothing changes
        monkeypatch.setattr(locked, "OPENED", {})
    argv = [word.replace("DATA", str(data)) for word in argv]
    check_mistake(script, argv, named, monkeypatch, capsys)


def test_a_person_is_asked_twice_for_a_new_passphrase(place, monkeypatch):
    said = []
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(weights, "getpass", lambda prompt: said.pop(0))
    for words in (["one", "another"], [""]):
        said[:] = words
        with pytest.raises(ValueError, match="nothing was changed"):
            weights.main(["lock", "run"])
    said[:] = [SECRET, SECRET]
    weights.main(["lock", with_key("run")])
    said[:] = [SECRET]
    weights.main(["unlock", "run"])
    assert not said


def test_a_package_that_lacks_is_named(place, monkeypatch, capsys):
    from engine import settings

    monkeypatch.setattr(settings.importlib.util, "find_spec", lambda name: None)
    argv = ["lock", "run", OPEN]
    check_mistake("weights", argv, ["pip install pyrage"], monkeypatch, capsys)
    argv = ["verify", "run", "--key=me.pub"]
    monkeypatch.setitem(sys.modules, "cryptography.exceptions", None)  # as where it lacks
    check_mistake("weights", argv, ["pip install cryptography"], monkeypatch, capsys)


def test_two_processes_do_not_lock_the_same_run(place, monkeypatch, capsys):
    with locked.held(Path("run")):
        argv = ["lock", "run", OPEN]
        check_mistake("weights", argv, ["another process"], monkeypatch, capsys)


# --- signed


@pytest.fixture
def signed(place) -> Path:
    weights.main(["sign", "run", "--key=me.key"])
    return place / "run"


def test_what_was_signed_is_verified_wherever_it_is(signed, tmp_path, capsys):
    shutil.copytree(signed, tmp_path / "elsewhere")
    weights.main(["verify", str(tmp_path / "elsewhere"), "--key=me.pub"])
    count = sum(path.is_file() for path in signed.rglob("*")) - 2
    assert f"{count} files, all signed by me.pub" in capsys.readouterr().out
    before = contents(signed)
    weights.main(["sign", "run", "--key=me.key"])  # the same files, the same bytes
    assert contents(signed) == before


def spoil(path: str, run: Path):
    content = bytearray((run / path).read_bytes())
    content[len(content) // 2] ^= 1
    (run / path).write_bytes(content)


def swap_weights(run: Path):
    """With a manifest that suits: sha256 alone would not notice."""
    from engine.files import write_manifest

    spoil("step-00000004/model.safetensors", run)
    (run / "step-00000004/manifest.json").unlink()
    write_manifest(run / "step-00000004")


def list_anew(run: Path):
    """The signature stays, and the list tells what is there."""
    spoil("step-00000004/model.safetensors", run)
    (run / "signed.json").write_bytes(signatures.manifest(run))


def reorder(run: Path):
    path = run / "signed.json"
    path.write_bytes(path.read_bytes().replace(b'"size":', b'"size": '))


def link(name: str, target):
    def make(run: Path):
        shutil.move(run / name, run.parent / "aside")
        (run / name).symlink_to(target or run.parent / "aside")

    return make


CHANGES = {
    "changed": (lambda run: spoil("step-00000004/state.json", run), "state.json' was changed"),
    "swapped": (swap_weights, "model.safetensors' was changed"),
    "cut": (lambda run: os.truncate(run / "config.json", 9), "'config.json' was changed"),
    "added": (lambda run: (run / "step-00000004/.new").touch(), r"\.new' was not signed"),
    "removed": (lambda run: (run / "metrics.jsonl").unlink(), "'metrics.jsonl' is missing"),
    "renamed": (lambda run: (run / "config.json").rename(run / "c.json"), "is missing.*not signed"),
    "list anew": (list_anew, "signed.json was changed"),
    "list in another form": (reorder, "signed.json was changed"),
    "no list": (lambda run: (run / "signed.json").unlink(), "is not signed"),
    "no signature": (lambda run: (run / "signed.sig").unlink(), "is not signed"),
    "another signature": (lambda run: spoil("signed.sig", run), "is not signed by me.pub"),
    "a cut signature": (lambda run: os.truncate(run / "signed.sig", 63), "is not signed by me"),
    "a link to the same": (link("config.json", None), "config.json is a link"),
    "a folder that is a link": (link("step-00000004", None), "step-00000004 is a link"),
    "a list that is a link": (link("signed.json", None), "signed.json is a link"),
    "a pipe": (lambda run: os.mkfifo(run / "pipe"), "pipe is a link or no file"),
}


@pytest.mark.parametrize("how", CHANGES)
def test_what_was_not_signed_is_refused_by_name(signed, how):
    change, words = CHANGES[how]
    change(signed)
    with pytest.raises(ValueError, match=words):
        weights.main(["verify", "run", "--key=me.pub"])


def test_a_signature_of_somebody_else_is_refused(signed):
    weights.main(["sign", "run", "--key=other.key"])
    with pytest.raises(ValueError, match=r"run is not signed by me.pub"):
        weights.main(["verify", "run", "--key=me.pub"])


def test_the_private_key_is_for_its_owner_only(place):
    os.umask(os.umask(0o000))
    assert stat.S_IMODE(os.stat("me.key").st_mode) == 0o600
    assert b"PRIVATE" in Path("me.key").read_bytes()
    assert b"PRIVATE" not in Path("me.pub").read_bytes()


@pytest.mark.skipif(not shutil.which("openssl"), reason="there is no openssl")
def test_openssl_finds_the_signature_sound(signed):
    command = "openssl pkeyutl -verify -rawin -pubin -inkey me.pub -in run/signed.json"
    assert subprocess.run([*command.split(), "-sigfile", "run/signed.sig"]).returncode == 0


def test_locked_and_unlocked_a_signed_run_stays_signed(signed):
    weights.main(["lock", with_key("run"), OPEN])
    with pytest.raises(ValueError, match="is not what was signed"):
        weights.main(["verify", "run", "--key=me.pub"])
    weights.main(["unlock", "run", OPEN])
    weights.main(["verify", "run", "--key=me.pub"])


def test_the_commands_of_its_page_run(place):
    """In their order, on this run."""
    text = (ROOT / "docs" / "weights.md").read_text(encoding="utf-8")
    commands = re.findall(r"^python weights\.py (.*)$", text, re.MULTILINE)
    done = [command.split()[0] for command in commands]
    assert done == ["lock", "unlock", "keys", "sign", "verify"]
    shutil.copytree("run", "out/small")
    Path("me.key").unlink(), Path("me.pub").unlink()
    with_key("out/small")
    for command in commands:
        weights.main(command.split())
