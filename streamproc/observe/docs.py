"""Swagger UI at `/docs` and ReDoc at `/redoc`, from files of this machine alone.

The files are those of the package fastapi-offline. Nothing in the pages is inline but styles, and the header
``Content-Security-Policy`` keeps the browser from asking any other server, whatever the pages would like to load.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files

from fastapi import APIRouter, Response

_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; font-src 'self'; "
    "connect-src 'self'; worker-src blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {"Content-Security-Policy": _POLICY, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
_FILES = {
    "swagger-ui-bundle.js": "text/javascript",
    "swagger-ui.css": "text/css",
    "redoc.standalone.js": "text/javascript",
    "favicon.png": "image/png",
}
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>streamproc: {title}</title>
<link rel="icon" href="docs/files/favicon.png">
{head}
</head>
<body>
<div id="page"></div>
<script src="docs/files/{bundle}"></script>
<script src="docs/files/{script}"></script>
</body>
</html>
"""
_SCRIPTS = {
    "swagger.js": 'SwaggerUIBundle({url: "openapi.json", dom_id: "#page", deepLinking: true, validatorUrl: null, '
    'defaultModelsExpandDepth: 0, layout: "BaseLayout"});\n',
    "redoc.js": 'Redoc.init("openapi.json", {disableSearch: false}, document.getElementById("page"));\n',
}


def docs_routes() -> APIRouter:
    """The pages and their files."""
    router = APIRouter(include_in_schema=False)
    swagger = _PAGE.format(
        title="try it out",
        head='<link rel="stylesheet" href="docs/files/swagger-ui.css">',
        bundle="swagger-ui-bundle.js",
        script="swagger.js",
    )
    redoc = _PAGE.format(title="reference", head="", bundle="redoc.standalone.js", script="redoc.js")

    @router.get("/docs")
    async def docs() -> Response:
        return Response(swagger, headers=_HEADERS, media_type="text/html")

    @router.get("/redoc")
    async def reference() -> Response:
        return Response(redoc, headers=_HEADERS, media_type="text/html")

    @router.get("/docs/files/{name}")
    async def file(name: str) -> Response:
        if name in _SCRIPTS:
            return Response(_SCRIPTS[name], headers=_HEADERS, media_type="text/javascript")
        if name not in _FILES:
            return Response(status_code=404)
        return Response(_content(name), headers={**_HEADERS, "Cache-Control": "max-age=3600"}, media_type=_FILES[name])

    return router


@cache
def _content(name: str) -> bytes:
    return (files("fastapi_offline") / "static" / name).read_bytes()
