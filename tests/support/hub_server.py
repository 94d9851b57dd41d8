"""A Hugging Face hub on this machine, for the real ``huggingface_hub`` client.

It speaks what the client asks of models and collections: resolution, trees, files (small ones itself, large ones by a
redirect to a store on another host name, as the hub does), search, and the upload of commits with LFS. It keeps every
request, and breaks when told to.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from aiohttp import web

TOKEN = "hf_" + "Stand1nForAUsersToken" * 2
DATE = "2026-01-02T03:04:05.000Z"
LARGE = (".pt", ".h5ad", ".h5mu", ".safetensors", ".zip")


@dataclass(frozen=True)
class Request:
    """What a client asked, and what it was told."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    status: int


@dataclass
class Repo:
    """A model repository: its commits (full hash to files), and what its branches and tags stand for."""

    id: str
    private: bool = False
    gated: bool = False
    tags: list[str] = field(default_factory=list)
    downloads: int = 0
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        parts = [self.id, branch, str(len(self.commits)), *sorted(f"{name}{_sha256(b)}" for name, b in files.items())]
        sha = hashlib.sha1("\0".join(parts).encode()).hexdigest()
        self.commits[sha] = dict(files)
        self.refs[branch] = sha
        return sha

    def resolve(self, revision: str) -> str | None:
        if revision in self.refs:
            return self.refs[revision]
        return next((sha for sha in self.commits if len(revision) >= 7 and sha.startswith(revision)), None)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _entry(path: str, content: bytes) -> dict[str, Any]:
    told = {"type": "file", "path": path, "size": len(content), "oid": _git_sha1(content)}
    if path.endswith(LARGE):
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{_sha256(content)}\nsize {len(content)}\n"
        told["oid"] = _git_sha1(pointer.encode())
        told["lfs"] = {"oid": _sha256(content), "size": len(content), "pointerSize": len(pointer)}
    return told


def _error(status: int, code: str) -> web.Response:
    return web.json_response({"error": code}, status=status, headers={"X-Error-Code": code, "X-Error-Message": code})


class HubServer:
    """The server, in a thread of its own.

    Attributes
    ----------
    url
        What ``HF_ENDPOINT`` is set to.
    repos, collections, objects
        What it holds: repositories and collections by name, LFS objects by SHA-256.
    requests
        All that was asked, in order.
    break_after, stall_after
        Bytes of an answer from the store after which the connection is cut, or nothing more comes; once.
    damage
        Names of files that come with another first byte than announced.
    page
        Models in one answer of a search.
    careless
        Whether ``If-Range`` is ignored, as some servers do.
    answer
        Status to answer everything with, 0 for none.
    """

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self.reset()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self._ready.wait(30)

    def reset(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.collections: dict[str, dict[str, Any]] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[Request] = []
        self.break_after = self.stall_after = self.answer = 0
        self.stalled = threading.Event()
        self.damage: set[str] = set()
        self.page = 100
        self.careless = False
        self.served: dict[str, bytes] = {}

    def add(self, name: str, files: dict[str, bytes], *, branch: str = "main", **told: Any) -> str:
        """Commit files to a repository, which is made if it is not there; the full hash."""
        repo = self.repos.setdefault(name, Repo(name))
        for key, value in told.items():
            setattr(repo, key, value)
        self.objects |= {_sha256(content): content for path, content in files.items() if path.endswith(LARGE)}
        return repo.commit(files, branch)

    def collect(self, owner: str, title: str, names: list[str]) -> str:
        """Make a collection; its slug."""
        slug = f"{owner}/{title.lower().replace(' ', '-')}-{hashlib.sha1(title.encode()).hexdigest()[:24]}"
        self.collections[slug] = {"title": title, "owner": owner, "names": list(names)}
        return slug

    def asked(self, method: str = "", part: str = "") -> list[Request]:
        """Requests of a method whose path holds a text."""
        return [one for one in self.requests if method in one.method and part in one.path]

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(30)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        app = web.Application(middlewares=[self._kept], client_max_size=1 << 30)
        api = "/api/models/{owner}/{name}"
        app.add_routes(
            [
                web.get("/api/models", self._search),
                web.get(api, self._info),
                web.get(api + "/revision/{revision}", self._info),
                web.get(api + "/tree/{revision}", self._tree),
                web.get(api + "/refs", self._refs),
                web.post(api + "/preupload/{revision}", self._preupload),
                web.post(api + "/commit/{revision}", self._commit),
                web.get("/{owner}/{name}/resolve/{revision}/{path:.+}", self._file),
                web.post("/{owner}/{name}.git/info/lfs/objects/batch", self._batch),
                web.get("/store/{oid}", self._stored),
                web.put("/store/{oid}", self._put),
                web.get("/served/{path:.+}", self._served),
                web.post("/api/repos/create", self._create),
                web.post("/api/validate-yaml", self._validate),
                web.get("/api/whoami-v2", self._whoami),
                web.get("/api/collections", self._list_collections),
                web.get("/api/collections/{owner}/{slug}", self._collection),
                web.post("/api/collections", self._create_collection),
                web.post("/api/collections/{owner}/{slug}/items", self._add_item),
            ]
        )
        runner = web.AppRunner(app, handle_signals=False, shutdown_timeout=0.1)
        self._loop.run_until_complete(runner.setup())
        site = web.TCPSite(runner, "127.0.0.1", 0)
        self._loop.run_until_complete(site.start())
        port = site._server.sockets[0].getsockname()[1]
        self.url, self.store = f"http://127.0.0.1:{port}", f"http://localhost:{port}/store"
        self._ready.set()
        self._loop.run_forever()
        self._loop.run_until_complete(runner.cleanup())
        left = asyncio.all_tasks(self._loop)  # an answer that never ends
        for task in left:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
        self._loop.close()

    @web.middleware
    async def _kept(self, request: web.Request, handler: Any) -> web.StreamResponse:
        note = [request.method, request.path, dict(request.query), {k.lower(): v for k, v in request.headers.items()}]
        place = len(self.requests)
        self.requests.append(Request(*note, status=0))  # kept before it is answered: an answer may never end
        try:
            response = web.Response(status=self.answer) if self.answer else await handler(request)
        except web.HTTPException as error:
            response = web.Response(status=error.status)
        self.requests[place] = Request(*note, status=response.status)
        return response

    def _repo(self, request: web.Request) -> Repo | web.Response:
        """A repository, or what the hub answers: a stranger is not told whether a private one is there."""
        sent = request.headers.get("Authorization", "")
        if sent and sent != f"Bearer {TOKEN}":
            return _error(401, "Invalid credentials in Authorization header")
        repo = self.repos.get(f"{request.match_info['owner']}/{request.match_info['name']}")
        if repo is None or (repo.private and not sent):
            return _error(404 if sent else 401, "RepoNotFound")
        return repo

    def _at(self, request: web.Request) -> tuple[Repo, str] | web.Response:
        repo = self._repo(request)
        if isinstance(repo, web.Response):
            return repo
        sha = repo.resolve(request.match_info.get("revision", "main"))
        return _error(404, "RevisionNotFound") if sha is None else (repo, sha)

    def _told(self, repo: Repo, sha: str | None) -> dict[str, Any]:
        files = repo.commits.get(sha or "", {})
        return {
            "_id": hashlib.sha1(repo.id.encode()).hexdigest()[:24],
            "id": repo.id,
            "sha": sha,
            "lastModified": DATE,
            "private": repo.private,
            "gated": "manual" if repo.gated else False,
            "disabled": False,
            "downloads": repo.downloads,
            "likes": 0,
            "tags": repo.tags,
            "siblings": [{"rfilename": path} for path in files],
        }

    async def _info(self, request: web.Request) -> web.Response:
        found = self._at(request)
        return found if isinstance(found, web.Response) else web.json_response(self._told(*found))

    async def _refs(self, request: web.Request) -> web.Response:
        repo = self._repo(request)
        if isinstance(repo, web.Response):
            return repo
        branches = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": sha} for name, sha in repo.refs.items()]
        return web.json_response({"branches": branches, "tags": [], "converts": []})

    async def _tree(self, request: web.Request) -> web.Response:
        found = self._at(request)
        if isinstance(found, web.Response):
            return found
        repo, sha = found
        return web.json_response([_entry(path, content) for path, content in repo.commits[sha].items()])

    async def _file(self, request: web.Request) -> web.StreamResponse:
        found = self._at(request)
        if isinstance(found, web.Response):
            return found
        repo, sha = found
        path = request.match_info["path"]
        if repo.gated:
            return _error(403, "GatedRepo")
        if path not in repo.commits[sha]:
            return _error(404, "EntryNotFound")
        content = repo.commits[sha][path]
        etag = f'"{_entry(path, content)["oid"]}"'
        headers = {"X-Repo-Commit": sha, "ETag": etag, "Accept-Ranges": "bytes"}
        if path.endswith(LARGE):
            headers |= {"X-Linked-ETag": f'"{_sha256(content)}"', "X-Linked-Size": str(len(content))}
            headers["Location"] = f"{self.store}/{_sha256(content)}?name={quote(path)}&X-Amz-Signature=of-the-store"
            return web.Response(status=302, headers=headers)
        return await self._send(request, content, headers, path)

    async def _stored(self, request: web.Request) -> web.StreamResponse:
        oid = request.match_info["oid"]
        return await self._send(request, self.objects[oid], {"ETag": f'"{oid}"'}, request.query.get("name", ""))

    async def _served(self, request: web.Request) -> web.StreamResponse:
        """Any file of ``served``, as an ordinary web server gives it."""
        content = self.served.get(request.match_info["path"])
        if content is None:
            return web.Response(status=404)
        etag = f'"{_sha256(content)[:20]}"'
        if request.headers.get("If-None-Match") == etag:
            return web.Response(status=304)
        return await self._send(request, content, {"ETag": etag}, request.match_info["path"])

    async def _send(
        self, request: web.Request, content: bytes, headers: dict[str, str], name: str
    ) -> web.StreamResponse:
        if name in self.damage:
            content = bytes([content[0] ^ 1]) + content[1:]
        status, start = 200, 0
        asked = request.headers.get("Range", "")
        if asked and (self.careless or request.headers.get("If-Range", headers["ETag"]) == headers["ETag"]):
            status, start = 206, int(asked.removeprefix("bytes=").rstrip("-"))
            if start >= len(content):
                return web.Response(status=416, headers={"Content-Range": f"bytes */{len(content)}"})
            headers = {**headers, "Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
        response = web.StreamResponse(status=status, headers={**headers, "Content-Length": str(len(content) - start)})
        await response.prepare(request)
        if request.method == "HEAD":
            return response
        stop = self.break_after or self.stall_after
        if stop and len(content) - start > stop:
            await response.write(content[start : start + stop])
            if self.stall_after:
                self.stall_after = 0
                self.stalled.set()
                await asyncio.sleep(3600)
            self.break_after = 0
            request.transport.close()
            return response
        await response.write(content[start:])
        await response.write_eof()
        return response

    async def _search(self, request: web.Request) -> web.Response:
        query = request.query
        models = [
            repo
            for repo in self.repos.values()
            if (not repo.private or request.headers.get("Authorization") == f"Bearer {TOKEN}")
            and {*query.getall("filter", [])} <= {*repo.tags}
            and query.get("search", "").lower() in repo.id.lower()
            and repo.id.startswith(query.get("author", ""))
        ]
        if query.get("sort") == "downloads":
            models.sort(key=lambda repo: -repo.downloads)
        start, stop = int(query.get("cursor", 0)), int(query.get("cursor", 0)) + self.page
        told = [self._told(repo, None) for repo in models[start : min(stop, int(query.get("limit", stop)))]]
        more = request.url.update_query(cursor=str(stop)) if stop < len(models) else None
        return web.json_response(told, headers={"Link": f'<{more}>; rel="next"'} if more else {})

    def _collection_told(self, slug: str, names: list[str]) -> dict[str, Any]:
        found = self.collections[slug]
        items = [{"_id": str(i), "id": name, "type": "model", "position": i} for i, name in enumerate(names)]
        told = {"slug": slug, "title": found["title"], "owner": {"name": found["owner"]}, "items": items}
        return told | {"lastUpdated": DATE, "private": False, "theme": "blue", "upvotes": 0, "position": 0}

    async def _list_collections(self, request: web.Request) -> web.Response:
        slugs = [slug for slug in self.collections if slug.startswith(f"{request.query.get('owner', '')}")]
        told = [self._collection_told(slug, self.collections[slug]["names"][:4]) for slug in slugs]
        return web.json_response([{k: v for k, v in one.items() if k != "position"} for one in told])

    async def _collection(self, request: web.Request) -> web.Response:
        slug = f"{request.match_info['owner']}/{request.match_info['slug']}"
        if slug not in self.collections:
            return _error(404, "Collection not found")
        return web.json_response(self._collection_told(slug, self.collections[slug]["names"]))

    async def _create_collection(self, request: web.Request) -> web.Response:
        asked = await request.json()
        slug = self.collect(asked["namespace"], asked["title"], [])
        return web.json_response(self._collection_told(slug, []))

    async def _add_item(self, request: web.Request) -> web.Response:
        slug = f"{request.match_info['owner']}/{request.match_info['slug']}"
        self.collections[slug]["names"].append((await request.json())["item"]["id"])
        return await self._collection(request)

    def _writer(self, request: web.Request) -> web.Response | None:
        return None if request.headers.get("Authorization") == f"Bearer {TOKEN}" else _error(401, "Unauthorized")

    async def _whoami(self, request: web.Request) -> web.Response:
        return self._writer(request) or web.json_response({"name": "lab", "type": "user", "orgs": []})

    async def _create(self, request: web.Request) -> web.Response:
        asked = await request.json()
        name = f"{asked.get('organization') or 'lab'}/{asked['name']}"
        if refused := self._writer(request):
            return refused
        if name in self.repos:
            return web.json_response({"error": "exists", "url": f"{self.url}/{name}"}, status=409)
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.add(name, {".gitattributes": b"*.pt filter=lfs\n"}, private=private)
        return web.json_response({"url": f"{self.url}/{name}", "name": name, "id": name})

    async def _validate(self, request: web.Request) -> web.Response:
        return web.json_response({"errors": [], "warnings": []})

    async def _preupload(self, request: web.Request) -> web.Response:
        if refused := self._writer(request):
            return refused
        files = [
            {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(LARGE) else "regular", "shouldIgnore": False}
            for f in (await request.json())["files"]
        ]
        return web.json_response({"files": files})

    async def _batch(self, request: web.Request) -> web.Response:
        objects = [
            {**asked, "actions": {} if asked["oid"] in self.objects else {"upload": {"href": self._href(asked["oid"])}}}
            for asked in (await request.json())["objects"]
        ]
        return web.json_response({"transfer": "basic", "objects": objects})

    def _href(self, oid: str) -> str:
        return f"{self.url}/store/{oid}"

    async def _put(self, request: web.Request) -> web.Response:
        content = await request.read()
        if _sha256(content) != request.match_info["oid"]:
            return web.Response(status=400)
        self.objects[_sha256(content)] = content
        return web.Response()

    async def _commit(self, request: web.Request) -> web.Response:
        if refused := self._writer(request):
            return refused
        found = self._at(request)
        if isinstance(found, web.Response):
            return found
        repo, sha = found
        files = dict(repo.commits[sha])
        for line in (await request.text()).splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.objects[value["oid"]]
            elif operation["key"] == "deletedFile":
                del files[value["path"]]
        if "README.md" in files:
            repo.tags = _card_tags(files["README.md"].decode()) or repo.tags
        made = repo.commit(files, request.match_info["revision"])
        told = {"commitUrl": f"{self.url}/{repo.id}/commit/{made}", "commitOid": made, "hookOutput": ""}
        return web.json_response(told | {"success": True, "pullRequestUrl": None})


def _card_tags(card: str) -> list[str]:
    """Tags that the hub makes of a card's header."""
    import yaml

    if not card.startswith("---"):
        return []
    header = yaml.safe_load(card.split("---")[1]) or {}
    tags = [str(tag) for tag in header.get("tags") or []]
    extra = [header["library_name"]] if "library_name" in header else []
    return tags + extra + ([f"license:{header['license']}"] if "license" in header else [])


def use(server: HubServer, monkeypatch: Any, *, token: str = "") -> None:
    """Make ``huggingface_hub`` talk to a server, as its variables do before it is imported."""
    import huggingface_hub
    from huggingface_hub import constants, hf_api

    huggingface_hub.close_session()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    for name in ("HF_HUB_OFFLINE", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # its store is not spoken here
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nonexistent/token")
    monkeypatch.setattr(hf_api.api, "endpoint", server.url)
