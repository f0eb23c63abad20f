"""A page in the browser around sample.py: upload a photo or a video, and speech; watch the result.

    pip install gradio
    python demo.py               # http://127.0.0.1:7860, for this machine alone

Uploads and results lie in one temporary folder, which is removed at the end.
"""

import os
import re
import tempfile

import sample
from media import FPS, SAMPLE_RATE, InputError, Parser, load_audio, run

LARGEST = "50mb"  # of an upload
LONGEST = 60  # seconds of speech; ours: a minute or two of computing
ABOUT = f"""# A talking face
A photo talks, a video is dubbed. Files up to {LARGEST.upper()}, speech up to {LONGEST} seconds, one job at a time.
Put no words into the mouth of anyone who has not agreed to it. The result says in its metadata that it was generated."""


def make_video(folder: str, face, speech, driving, mouth: float, part: str) -> str:
    """The page's files and settings -> path of the video, in `folder`. InputError: as sample.py; none, or long speech"""
    if not (face and speech):
        raise InputError("a photo or a video, and speech are needed")
    seconds = len(load_audio(speech, normalise=False)) / SAMPLE_RATE
    if seconds > LONGEST:
        raise InputError(f"the speech has {seconds:.0f} seconds, at most {LONGEST} are allowed")
    out = f"{folder}/talk.mp4"
    options = [*(["--driving", driving] if driving else []), *(["--crop"] if part == "crop" else [])]
    sample.main([face, speech, "--out", out, "--overwrite", "--mouth", str(mouth), *options])
    return out


def page(gr, folder: str):
    """The page, gradio's Blocks"""
    def talk(face, speech, driving, mouth, part, progress=gr.Progress(track_tqdm=True)):  # noqa: B008
        try:
            return make_video(folder, face, speech, driving, mouth, part)
        except InputError as error:  # one line, without the folders of this machine
            text = re.sub(f"{re.escape(folder)}/([^/ ]*/)*", "", str(error))
            raise gr.Error(text, title="", print_exception=False) from None

    with gr.Blocks(title="FC-TFG", delete_cache=(3600, 3600), analytics_enabled=False) as blocks:  # seconds
        gr.Markdown(ABOUT)
        with gr.Row():
            with gr.Column():
                face = gr.File(label="Photo, or video to be dubbed", file_types=["image", "video"], height=120)
                speech = gr.Audio(label="Speech", sources=["upload", "microphone"], type="filepath")
                driving = gr.File(label="Driving video for a photo (optional)", file_types=["video"], height=120)
                mouth = gr.Slider(0, 2, 1, step=0.1, label="Strength of the lips' motion")
                part = gr.Radio(["whole", "crop"], value="whole", label="Whole photo, or the network's crop")
            with gr.Column():
                button = gr.Button("Talk", variant="primary")
                video = gr.Video(label=f"Result, {FPS} frames a second", autoplay=True)
        gr.Examples([[str(sample.EXAMPLE_PHOTO), str(sample.EXAMPLE_SPEECH)]], [face, speech])
        button.click(talk, [face, speech, driving, mouth, part], video, concurrency_limit=1)
    return blocks


def main(argv=None):
    p = Parser(description="A page in the browser around sample.py.")
    p.add_argument("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0: all (default: this machine alone)")
    p.add_argument("--port", type=int, default=7860, help="port to listen at (default: 7860)")
    args = p.parse_args(argv, port=(1, 65535))
    with tempfile.TemporaryDirectory(prefix="talk-demo-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = f"{folder}/shown"  # results are copied there: the next job overwrites its file
        try:
            import gradio
            blocks = page(gradio, folder).queue(max_size=8)
            blocks.launch(server_name=args.host, server_port=args.port, max_file_size=LARGEST)
        except ImportError:
            raise InputError("the page needs gradio: pip install gradio") from None
        except OSError:
            raise InputError(f"--port {args.port} is taken, or --host {args.host} is not this machine") from None


if __name__ == "__main__":
    run(main)
