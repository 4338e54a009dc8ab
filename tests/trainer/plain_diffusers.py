"""An interpreter that has diffusers and not this project: draws with exported folders. A line of JSON in, one out.

Run as a script by `Plain`, which hides this project from it: without site (-S) the path file of the editable install is
not read, -P keeps this file's folder off the path, and it starts elsewhere. It says which of our packages it could import.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

OURS = ("configs", "data", "models", "trainer", "launcher", "tests")


class Plain:
    """That interpreter as a process; `scratch` is where it starts and keeps the code that it loads."""

    def __init__(self, scratch: Path) -> None:
        paths = sysconfig.get_paths()
        environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
        environment |= {
            "PYTHONPATH": os.pathsep.join(dict.fromkeys((paths["purelib"], paths["platlib"]))),
            "HF_HOME": str(scratch / "hub"),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        }
        self._process = subprocess.Popen(
            [sys.executable, "-S", "-P", __file__],
            cwd=scratch,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(scratch / "stderr.log").open("w"),
            text=True,
        )
        self._log = scratch / "stderr.log"

    def ask(self, **request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, self._log.read_text()[-4000:]
        answer: dict[str, Any] = json.loads(line)
        return answer

    def stop(self) -> None:
        self._process.kill()
        self._process.communicate()


def without_video(folder: Path) -> Any:
    """The processor of an editing pipeline: its video part cannot be made where torchvision is missing, as here."""
    from transformers import Qwen2Tokenizer
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    from transformers.models.qwen2_vl.processing_qwen2_vl import Qwen2VLProcessor
    from transformers.processing_utils import ProcessorMixin

    class Processor(Qwen2VLProcessor):
        def __init__(self, image_processor: Any = None, tokenizer: Any = None) -> None:
            self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
            self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
            self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
            ProcessorMixin.__init__(self, image_processor, tokenizer)

    images = Qwen2VLImageProcessorPil.from_pretrained(folder / "processor", local_files_only=True)
    return Processor(images, Qwen2Tokenizer.from_pretrained(folder / "tokenizer", local_files_only=True))


def serve() -> None:
    import torch
    from diffusers import DiffusionPipeline
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as edit_plus
    from PIL import Image

    # Sources are brought to these areas: a tiny model needs tiny ones.
    edit_plus.VAE_IMAGE_SIZE, edit_plus.CONDITION_IMAGE_SIZE = 32**2, 64**2
    torch.set_num_threads(1)
    for line in sys.stdin:
        request = json.loads(line)
        folder = Path(request["folder"])
        parts = {"processor": without_video(folder)} if (folder / "processor").is_dir() else {}
        pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, **parts)
        if request.get("stock"):
            pipe = type(pipe).__mro__[2](**pipe.components)
        pipe.set_progress_bar_config(disable=True)
        images = {}
        for name, call in request["calls"].items():
            generator = torch.Generator().manual_seed(request["seed"])
            if "image" in call:
                call["image"] = [Image.open(path).convert("RGB") for path in call["image"]]
            images[name] = pipe(prompt=request["prompts"], generator=generator, output_type="pt", **call).images.cpu()
        torch.save(images, request["out"])
        found = [name for name in OURS if importlib.util.find_spec(name) is not None]
        loaded = [name for name in sys.modules if name.split(".")[0] in OURS]
        print(json.dumps({"ours": found + loaded, "pipeline": type(pipe).__name__}), flush=True)


if __name__ == "__main__":
    serve()
