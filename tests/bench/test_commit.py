"""Results name the commit of ditq's own sources, never that of a checkout that ditq is installed into."""

import subprocess

from ditq_bench import results


def git(folder, *arguments):
    identity = ("-c", "user.name=n", "-c", "user.email=e@example.org")
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_a_checkout_around_the_installed_package_is_not_its_source(tmp_path, monkeypatch):
    git(tmp_path, "init", "-q")
    installed = tmp_path / "site-packages" / "ditq_bench" / "results.py"
    installed.parent.mkdir(parents=True)
    installed.write_text("x", encoding="utf-8")
    (tmp_path / "own.py").write_text("y", encoding="utf-8")
    git(tmp_path, "add", "own.py")
    git(tmp_path, "commit", "-qm", "Mine")
    monkeypatch.setattr(results, "__file__", str(installed))
    assert results.commit() == "unknown"
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "Its sources")
    assert results.commit() == git(tmp_path, "rev-parse", "--short", "HEAD")
