"""`tf-dist chat`: lines in a terminal, and a page on the loopback address."""

import http.client
import json
import threading

import pytest

from tf_dist.cli.chat import talk
from tf_dist.errors import DataError, UsageError
from tf_dist.run.chat_server import server


def test_each_line_is_a_prompt_and_an_empty_one_goes_on(capsys):
    asked = []

    def go_on(text):
        asked.append(text)
        yield from (" a", "b")

    assert talk(iter(["one\n", "\n", "two\n"]), go_on, False) == 0
    assert asked == ["one", "one ab", "two"]
    assert capsys.readouterr().out == " ab\n" * 3


def test_what_the_tokenizer_does_not_have_ends_nothing(capsys):
    def go_on(text):
        if text == "bad":
            raise DataError("no such character")
        yield "fine"

    assert talk(iter(["bad\n", "good\n"]), go_on, True) == 0
    found = capsys.readouterr()
    assert found.err == "error: no such character\n" and "fine" in found.out and found.out.startswith("> ")


@pytest.fixture
def page():
    """A server that continues a text with itself, and refuses one; and its port."""

    def go_on(text, tokens, sampling):
        for number in range(tokens):
            yield f"{text}{number} "

    def check(text):
        if "~" in text:
            raise DataError("character '~' is unknown")

    serving = server(0, "a <run>", go_on, check)
    thread = threading.Thread(target=serving.serve_forever)
    thread.start()
    yield serving.server_port
    serving.shutdown()
    serving.server_close()
    thread.join()


def ask(port, method, path, body=None, **headers):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request(method, path, body, {"Host": f"127.0.0.1:{port}", **headers})
    answer = connection.getresponse()
    data = answer.read().decode()
    connection.close()
    return answer, data


def test_the_page_and_its_text(page):
    answer, html = ask(page, "GET", "/")
    assert answer.status == 200 and "default-src 'none'" in answer.headers["Content-Security-Policy"]
    assert "<title>a &lt;run&gt;</title>" in html
    answer, text = ask(page, "POST", "/generate", json.dumps({"prompt": "ü", "tokens": 3}))
    assert (answer.status, text) == (200, "ü0 ü1 ü2 ")


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("no json", "not JSON"),
        ("[]", "no prompt"),
        ('{"prompt": 7}', "no prompt"),
        ('{"prompt": "a", "tokens": 0}', "1 to 4096"),
        ('{"prompt": "a", "tokens": 99999}', "1 to 4096"),
        ('{"prompt": "a", "temperature": "hot"}', "temperature is no number"),
        ('{"prompt": "a", "temperature": -1}', "temperature"),
        ('{"prompt": "~"}', "is unknown"),
    ],
)
def test_a_bad_request_is_refused_with_the_reason(page, body, said):
    answer, text = ask(page, "POST", "/generate", body)
    assert answer.status == 400 and said in text


def test_a_page_of_another_site_gets_nothing(page):
    for headers in ({"Host": "evil.example"}, {"Origin": "http://evil.example"}):
        for method, path in (("GET", "/"), ("POST", "/generate")):
            assert ask(page, method, path, '{"prompt": "a"}', **headers)[0].status == 404
    assert ask(page, "GET", "/../setup.cfg")[0].status == 404
    assert ask(page, "POST", "/generate", '{"prompt": "a"}', **{"Content-Length": "9999999"})[0].status == 400


def test_a_port_that_is_taken_is_said(page):
    with pytest.raises(UsageError, match=f"--serve {page}: .*Choose another port"):
        server(page, "", None, None)
