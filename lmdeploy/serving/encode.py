"""POST /v1/encode: text -> token ids."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from lmdeploy.serving.openai.errors import read_body
from lmdeploy.serving.openai.protocol import EncodeRequest
from lmdeploy.serving.service import Service, service_of

router = APIRouter(tags=["lmdeploy"])


@router.post("/v1/encode", summary="Tokenise")
async def encode(request: Request) -> Response:
    """`do_preprocess` applies the chat template first. A list of texts gives a list of id lists."""
    service = service_of(request)
    body = await read_body(request, EncodeRequest)
    texts = [body.input] if isinstance(body.input, str) else body.input
    ids = await asyncio.to_thread(_encode, service, texts, bool(body.do_preprocess), body.add_bos is not False)
    lengths = [len(i) for i in ids]
    if isinstance(body.input, str):
        return JSONResponse({"input_ids": ids[0], "length": lengths[0]})
    return JSONResponse({"input_ids": ids, "length": lengths})


def _encode(service: Service, texts: list[str], do_preprocess: bool, add_bos: bool) -> list[list[int]]:
    frontend = service.frontend
    if do_preprocess:
        return [frontend.encode_prompt(text, do_preprocess=True) for text in texts]
    return [frontend.tokenizer.encode(text, add_bos=add_bos) for text in texts]
