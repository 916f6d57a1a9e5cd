"""GET /v1/models and GET /v1/models/{model}."""

from __future__ import annotations

import time

import falcon

from worker_orcd.errors import InvalidRequest
from worker_orcd.wsgi.openai.answers import Model, ModelList
from worker_orcd.wsgi.openai.generation import answer
from worker_orcd.wsgi.service import Service


class UnknownModel(InvalidRequest):
    """There is no model of this name."""

    status = 404
    openai_code = "model_not_found"


class Models:
    """GET /v1/models: the one model that is served."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._created = int(time.time())

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        """A list of one."""
        answer(resp, ModelList([self.model()]))

    def model(self) -> Model:
        """The model.

        Raises:
            NotReady: it is not loaded yet.
        """
        llm = self._service.llm()
        return Model(self._service.model, self._created, llm.info.context_length)


class OneModel:
    """GET /v1/models/{model}: the served model by its name."""

    def __init__(self, service: Service) -> None:
        self._models = Models(service)

    def on_get(self, req: falcon.Request, resp: falcon.Response, model: str) -> None:
        """The model, or 404 where the name is another's."""
        served = self._models.model()
        if model != served.id:
            raise UnknownModel("the model does not exist; GET /v1/models names the one that is served", field="model")
        answer(resp, served)
