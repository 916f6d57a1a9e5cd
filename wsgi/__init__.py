"""The HTTP worker: a Falcon application under gunicorn. Installed as `worker_orcd.wsgi`."""
