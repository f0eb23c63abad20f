"""Web page for sample.py: upload a photo or a video and speech, watch the result.

    pip install gradio
    python demo.py               # http://127.0.0.1:7860 or the next free port, for this machine alone

Gradio's variables GRADIO_SERVER_NAME and GRADIO_SERVER_PORT change the address. Uploads and results are stored in one
temporary folder, which is deleted at the end.
"""

import os
import re
import tempfile

import sample
from media import FPS, SAMPLE_RATE, InputError, Parser, load_audio, run

MAX_UPLOAD = "50mb"
MAX_SECONDS = 60  # of speech; ours: one or two minutes of computing
DESCRIPTION = f"""# A talking face
A photo talks, a video is dubbed. Files up to {MAX_UPLOAD.upper()}, speech up to {MAX_SECONDS} seconds, one job at a time.
Put no words into the mouth of anyone who has not agreed to it. The metadata of the result says that it was generated."""


def make_video(folder: str, face, speech, driving, mouth: float, output: str) -> str:
    """Uploads and settings -> path of the video in `folder`. InputError: see sample.py; no file; long speech."""
    if not (face and speech):
        raise InputError("a photo or a video and speech are needed")
    seconds = len(load_audio(speech, normalise=False)) / SAMPLE_RATE
    if seconds > MAX_SECONDS:
        raise InputError(f"the speech has {seconds:.0f} seconds, at most {MAX_SECONDS} are allowed")
    out = f"{folder}/talk.mp4"
    options = (["--driving", driving] if driving else []) + (["--crop"] if output == "crop" else [])
    sample.main([face, speech, "--out", out, "--overwrite", "--mouth", str(mouth), *options])
    return out


def build_page(gr, folder: str):
    """The page as gradio's Blocks."""
    def talk(face, speech, driving, mouth, output, progress=gr.Progress(track_tqdm=True)):  # noqa: B008
        try:
            return make_video(folder, face, speech, driving, mouth, output)
        except InputError as error:  # shown without the folders of this machine
            message = re.sub(f"{re.escape(folder)}/([^/ ]*/)*", "", str(error))
            raise gr.Error(message, title="", print_exception=False) from None

    with gr.Blocks(title="FC-TFG", delete_cache=(3600, 3600), analytics_enabled=False) as blocks:  # seconds
        gr.Markdown(DESCRIPTION)
        with gr.Row():
            with gr.Column():
                face = gr.File(label="Photo, or video to be dubbed", file_types=["image", "video"], height=120)
                speech = gr.Audio(label="Speech", sources=["upload", "microphone"], type="filepath")
                driving = gr.File(label="Driving video for a photo (optional)", file_types=["video"], height=120)
                mouth = gr.Slider(0, 2, 1, step=0.1, label="Strength of the lips' motion")
                output = gr.Radio(["whole", "crop"], value="whole", label="Whole photo or the network's crop")
            with gr.Column():
                button = gr.Button("Talk", variant="primary")
                video = gr.Video(label=f"Result, {FPS} frames a second", autoplay=True)
        gr.Examples([[str(sample.EXAMPLE_PHOTO), str(sample.EXAMPLE_SPEECH)]], [face, speech])
        button.click(talk, [face, speech, driving, mouth, output], video, concurrency_limit=1)
    return blocks


def main(argv=None):
    Parser(description="Web page for sample.py.").parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="talk-demo-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = f"{folder}/shown"  # gradio copies results there; the next job overwrites talk.mp4
        try:
            import gradio
            build_page(gradio, folder).queue(max_size=8).launch(max_file_size=MAX_UPLOAD)
        except ImportError:
            raise InputError("the page needs gradio: pip install gradio") from None
        except OSError as error:  # no free port, or not an address of this machine
            raise InputError(str(error)) from None


if __name__ == "__main__":
    run(main)
