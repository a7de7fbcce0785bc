"""A model knows the ids of one tokenizer: a run keeps to its own tokens, whatever became of its files."""

import json
import re
import shlex

WORDS = ["河很宽", "船很小", "桥", "水是绿色的", "夜里的灯", "石头"]
EVALUATE = """
import shutil
from pathlib import Path
from tf_dist.cli import evaluate
from tf_dist.errors import TfDistError

def ask(*flags):
    try:
        evaluate.main(["--run-dir", "run", *flags])
    except TfDistError as error:
        print("refused", error.exit_code, error)
    print("-----", flush=True)

ask()
with open("text.txt", "a", encoding="utf-8") as text:
    text.write("#quartz #jinx, zebra. " * 400)
ask()
Path("table.csv").write_text("id,body\\n1,\\u6cb3\\u5f88\\u5bbd\\u3002\\u6865\\n", encoding="utf-8")
ask("--data", "table.csv")
ask("--data", "table.csv", "--text-column", "body")
Path("other.txt").write_text("\\u6cb3\\u6865\\u00c4", encoding="utf-8")
ask("--data", "other.txt")
(folder,) = Path("prepared").glob("text-*")
shutil.move(folder, "moved")
ask()
shutil.move("moved", folder)
tokenizer = Path("run/tokenizer.json")
spelled = tokenizer.read_text(encoding="utf-8")
tokenizer.write_text(spelled.replace("\\\\u6cb3", "\\\\u6cb4"), encoding="utf-8")
ask()
tokenizer.write_text(spelled, encoding="utf-8")
"""


def test_a_run_keeps_to_its_own_tokens(launcher, small, tmp_path):
    text = "。".join(WORDS[(number * number) % 7 % 6] for number in range(900))
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    flags = ["train.py", *small, "--data", "text.txt", "--tokenizer", "char", "--prepared-dir", "prepared"]
    flags += ["--run-dir", "run", "--save-every", "4"]
    first = launcher.start(0, *flags, "--steps", "4", cwd=tmp_path).wait()
    assert first.code == 0, first.output

    (advised,) = re.findall(r"^more text +python scripts/(generate\.py .*)", first.output, re.MULTILINE)
    script, *words = shlex.split(advised)
    written = launcher.start(0, script, *words, "--tokens", "3", cwd=tmp_path).wait()
    assert written.code == 0, written.output

    (tmp_path / "ask.py").write_text(EVALUATE)
    asked = launcher.start(0, "ask.py", cwd=tmp_path).wait()
    assert asked.code == 0, asked.output
    before, after, no_column, table, unknown, gone, foreign = asked.output.split("-----\n")[:-1]
    own = [json.loads(said.strip().splitlines()[-1]) for said in (before, after)]
    assert own[0] == own[1]
    assert "changed" not in before
    assert (
        "the corpus has changed (text.txt: other sizes or times) since the run was trained: these are"
        in after
    )
    assert "refused 65" in no_column
    assert "Columns: id, body. Use --text-column" in no_column
    assert json.loads(table.strip().splitlines()[-1])["val_loss"] > 0
    assert "refused 65 other.txt: character 'Ä' (U+00C4, character 2 of the text, line 1)" in unknown
    assert "refused 65 the run's tokens are not in prepared any more" in gone
    assert "refused 77 run/tokenizer.json is not the tokenizer that the model was trained with" in foreign

    resumed = launcher.start(0, *flags, "--steps", "8", cwd=tmp_path).wait()
    assert resumed.code == 0, resumed.output
    assert "it continues with its own tokens" in resumed.output
    assert "resumed at step 4" in resumed.output
    assert len(list((tmp_path / "prepared").glob("text-*"))) == 1, "tokens were made that nobody asked for"
