from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer

from data.demo import write_digits


class ObjectStore:
    """A moto server on a free port of 127.0.0.1 that counts the GETs of every path."""

    def __init__(self) -> None:
        self.gets: Counter[str] = Counter()
        self._server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        self._server.start()
        self._server._server.app = self._counting(self._server._server.app)  # type: ignore[union-attr]
        host, port = self._server.get_host_and_port()
        self.endpoint_url = f"http://{host}:{port}"
        self.client = boto3.session.Session().client("s3", endpoint_url=self.endpoint_url)

    def _counting(self, app: Callable[..., Iterable[bytes]]) -> Callable[..., Iterable[bytes]]:
        def counted(environ: dict[str, str], start_response: object) -> Iterable[bytes]:
            if environ["REQUEST_METHOD"] == "GET":
                self.gets[environ["PATH_INFO"]] += 1
            return app(environ, start_response)

        return counted

    def upload(self, folder: Path, bucket: str, prefix: str) -> str:
        self.client.create_bucket(Bucket=bucket)
        for path in sorted(folder.iterdir()):
            self.client.put_object(Bucket=bucket, Key=f"{prefix}/{path.name}", Body=path.read_bytes())
        return f"s3://{bucket}/{prefix}"

    def stop(self) -> None:
        self._server.stop()


@pytest.fixture(scope="session")
def store() -> Iterator[ObjectStore]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        server = ObjectStore()
        yield server
        server.stop()


@pytest.fixture(scope="session")
def digits_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "digits"
    write_digits(folder, shard_size=128, size=8)
    return folder


@pytest.fixture(scope="session")
def digits_on_s3(store: ObjectStore, digits_folder: Path) -> str:
    return store.upload(digits_folder / "train", "digits", "sets/train")
