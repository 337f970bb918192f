import json

import numpy as np
import pytest
from typer.testing import CliRunner

from cllm import lattice
from cllm.cli.lattice import app
from cllm.core.errors import UserError

runner = CliRunner()


@pytest.fixture
def basis(tmp_path, q_ary):
    path = tmp_path / "basis.npy"
    np.save(path, q_ary(12, 101, 0))
    return path


def run(*arguments: object) -> dict:
    result = runner.invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0
    return json.loads(result.stdout)


def test_reduce_prints_a_verified_reduction(basis):
    found = run("reduce", basis, "--method", "bkz", "--block-size", 10)
    B, U, R = np.load(basis), np.array(found["transform"]), np.array(found["basis"])
    assert (U @ B == R).all()
    assert found["certificate"]["unimodular"]
    defects = found["measures"]["mean_ratio_db"]
    assert defects["after"] < defects["before"]


def test_cvp_and_svp(basis, tmp_path, rng):
    T = rng.uniform(0, 101, (5, 12))
    np.save(tmp_path / "targets.npy", T)
    found = run("cvp", basis, tmp_path / "targets.npy", "--method", "exact")
    expected = lattice.closest(np.load(basis), T, "exact")
    np.testing.assert_allclose(found["distances"], expected.distances)
    np.save(tmp_path / "long.npy", T.astype(np.longdouble))
    long = run("cvp", basis, tmp_path / "long.npy", "--method", "exact")
    assert long["distances"] == found["distances"]
    found = run("svp", basis)
    assert found["is_exact"]
    assert found["norm"] == pytest.approx(lattice.shortest(np.load(basis)).norm)


def test_a_time_limit_is_flagged(tmp_path, q_ary):
    basis = tmp_path / "large.npy"
    np.save(basis, q_ary(60, 1009, 0))
    for command in (["reduce", basis, "--block-size", 30], ["svp", basis]):
        arguments = [*map(str, command), "--method", "bkz", "--max-seconds", "1e-9"]
        result = runner.invoke(app, arguments, catch_exceptions=False)
        assert result.exit_code == 0
        assert json.loads(result.stdout)["finished"] is False
        assert "stopped by --max-seconds" in result.stderr
    found = run("reduce", basis, "--method", "bkz", "--block-size", 2, "--max-seconds", 600)
    assert found["finished"] is True
    result = runner.invoke(app, ["reduce", str(basis), "--max-seconds", "5"])
    assert isinstance(result.exception, UserError)
    assert "lll cannot be stopped" in str(result.exception)


def test_out(basis, tmp_path):
    for name in ("reduced.npy", "reduced.json"):
        result = runner.invoke(app, ["reduce", str(basis), "--out", str(tmp_path / name)])
        assert result.exit_code == 0
        assert result.stdout == ""
    written = np.load(tmp_path / "reduced.npy")
    assert written.tolist() == json.loads((tmp_path / "reduced.json").read_text())["basis"]


def test_plots_are_written_as_png_and_svg(basis, tmp_path):
    plane = tmp_path / "plane.npy"
    np.save(plane, np.array([[1.0, 0.2], [0.55, 0.9]]))
    for arguments in (
        ["profile", str(basis)],
        ["plane", str(plane)],
        ["ulam", "--count", "400"],
        ["divisors", "un=2,do=3,undo=6,doing=15"],
    ):
        out = tmp_path / arguments[0]
        result = runner.invoke(app, ["plot", *arguments, "--out", str(out)], catch_exceptions=False)
        assert result.exit_code == 0
        assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
        assert b"<svg" in out.with_suffix(".svg").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["reduce", "absent.npy"], "absent.npy: no such file"),
        (["reduce", "BASIS", "--method", "magic"], "method"),
        (["reduce", "BASIS", "--out", "here.txt"], r"here.txt.*\.npy or \.json"),
        (["reduce", "TEXT"], "not a .npy file"),
        (["cvp", "BASIS", "BASIS", "--method", "magic"], "method"),
        (["reduce", "ZIP"], "not a .npy file"),
        (["cvp", "BASIS", "BASIS", "--out", "here.txt", "--beams", "0"], r"\.npy or \.json"),
        (["svp", "absent.npy", "--out", "here"], r"\.npy or \.json"),
        (["plot", "ulam", "--count", "0"], "--count"),
        (["plot", "ulam", "--count", "9", "--out", "/nodir/x"], "cannot write /nodir/x"),
        (["plot", "magic"], "kind"),
        (["plot", "plane"], "source"),
        (["plot", "plane", "BASIS"], r"\(2, 2\).*\(12, 12\)"),
        (["plot", "divisors", "2,x"], "invalid literal"),
    ],
)
def test_mistakes_are_user_errors(basis, tmp_path, arguments, message):
    (tmp_path / "text.npy").write_text("no array")
    (tmp_path / "zip.npy").write_bytes(b"PK\x03\x04 and no archive")
    names = {"BASIS": str(basis), "TEXT": str(tmp_path / "text.npy")}
    names["ZIP"] = str(tmp_path / "zip.npy")
    result = runner.invoke(app, [names.get(a, a) for a in arguments])
    assert isinstance(result.exception, UserError)
    with pytest.raises(UserError, match=message):
        raise result.exception
