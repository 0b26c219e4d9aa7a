"""Bundles as a service: an HTTP server whose pictures are those that `smalti generate` draws. Imports what tasks offer;
nothing else imports it but the command line. Needs the extra "serve".

worker.py       the engine's thread and the thread that makes answers; jobs come, go, and are given up
openai_api.py   what a request may say: fields, limits, errors, as in OpenAI's Images API, and ours beside them
answers.py      from a request to a job, and from what was drawn to the answer
app.py          the routes, keys, bounds, deadlines
metrics.py      what Prometheus reads
run.py          starting a server, and ending it in good order
page/           the page at /: HTML, JavaScript and CSS as they are
"""
