"""podman as a kubelet, for the tests of tests/pod: a rendered object -> its pod, with volumes as folders; and what a pod needs around
it: a registry, files over HTTP, images.

Needs root and what tests/install brings.
"""

import base64
import contextlib
import functools
import http.server
import json
import os
import pathlib
import shutil
import socket
import subprocess
import tarfile
import tempfile
import threading
import time

HERE = pathlib.Path(__file__).resolve().parent
USER, PASSWORD = "tester", "s3cret"
REGISTRY, DATA = "registry.test", "data.test"
PODMAN = []


@contextlib.contextmanager
def stage():
    """A work folder and an exit stack; podman's storage lies in the folder, so that nothing of the machine's is touched."""
    check(shutil.which("podman"), "podman is missing: ./tests/install")
    with tempfile.TemporaryDirectory(prefix="hone-pod-") as text, contextlib.ExitStack() as stack:
        work = pathlib.Path(text)
        work.chmod(0o755)
        os.environ["CONTAINERS_CONF"] = str(containers_conf(work))
        places = [f"--{name}={work / name}" for name in ("root", "runroot", "tmpdir")]
        PODMAN[:] = ["podman", *places, "--storage-driver=overlay"]
        stack.callback(subprocess.run, [*PODMAN, "rmi", "-f", "-a"], capture_output=True)
        os.environ["PODMAN"] = " ".join(PODMAN)
        yield work, stack


def containers_conf(work):
    """No network of its own, no systemd, and no limits that an unprivileged machine cannot give."""
    hosts = work / "hosts"
    hosts.write_text(f"127.0.0.1 localhost {REGISTRY} {DATA}\n")
    conf = work / "containers.conf"
    conf.write_text(
        "[containers]\n"
        'default_ulimits = ["nofile=1024:1024", "nproc=1000:1000"]\n'
        f'netns = "host"\nbase_hosts_file = "{hosts}"\n'
        '[engine]\nruntime = "runc"\ncgroup_manager = "cgroupfs"\nevents_logger = "file"\n'
    )
    return conf


def start_registry(folder, stack, password=True):
    """docker-registry with TLS, and a password unless told otherwise; returns host:port."""
    (folder / "data").mkdir(parents=True)
    key, certificate = folder / "tls.key", folder / "ca.crt"
    run(
        *"openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 30 -subj /CN=registry".split(),
        *("-addext", f"subjectAltName=DNS:{REGISTRY},DNS:localhost", "-keyout", key, "-out", certificate),
    )
    (folder / "htpasswd").write_text(run("htpasswd", "-Bbn", "-C", "4", USER, PASSWORD))
    port = free_port()
    (folder / "config.yml").write_text(
        "version: 0.1\nlog: {level: warn, accesslog: {disabled: true}}\n"
        f"storage: {{filesystem: {{rootdirectory: {folder}/data}}}}\n"
        f"http: {{addr: '127.0.0.1:{port}', secret: x, tls: {{certificate: {certificate}, key: {key}}}}}\n"
        + (f"auth: {{htpasswd: {{realm: test, path: {folder}/htpasswd}}}}\n" if password else "")
    )
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(["docker-registry", "serve", folder / "config.yml"], stdout=log, stderr=log)
    stack.callback(process.kill)
    wait_for(port, process)
    return f"{REGISTRY}:{port}"


def serve(folder, stack):
    """The folder's files over HTTP; returns host:port."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    handler = functools.partial(Quiet, directory=folder)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    stack.callback(server.shutdown)
    return f"{DATA}:{server.server_port}"


def push_model(work, registry):
    """The example's model as an image: its files, one layer; returns its name."""
    archive = work / "model.tar"
    with tarfile.open(archive, "w") as tar:
        tar.add(work / "example" / "model", "model")
    name = "localhost/model:latest"
    run(*PODMAN, "import", "--quiet", archive, name)
    local = registry.replace(REGISTRY, "localhost")
    run(*PODMAN, "push", "--quiet", "--tls-verify=false", f"--creds={USER}:{PASSWORD}", name, f"docker://{local}/models/tiny:1")
    return f"{registry}/models/tiny:1"


def render(hone, *files):
    """As a person would: the output goes to a file, whatever is wrong to the screen."""
    flags = [word for file in files for word in ("-f", file)]
    return json.loads(run(hone, "render", *flags, "--format", "json"))["items"]


def as_pod(objects, kind, work, registry, certificate, password=PASSWORD):
    """The pod that the kubelet makes of the Job or StatefulSet, and its volumes by name, each a folder on the host."""
    configs = {item["metadata"]["name"]: item["data"] for item in objects if item["kind"] == "ConfigMap"}
    configs["registry-ca"] = {"ca.crt": certificate.read_text()}
    login = base64.b64encode(f"{USER}:{password}".encode()).decode()
    secrets = {"registry-login": {".dockerconfigjson": json.dumps({"auths": {registry: {"auth": login}}})}}
    [made] = [item for item in objects if item["kind"] == kind]
    spec = json.loads(json.dumps(made["spec"]["template"]["spec"]))
    folders = {}
    for volume in spec["volumes"]:
        name = volume.pop("name")
        [(kind, source)] = volume.items()
        folder = folders[name] = work / name
        folder.mkdir(parents=True)
        if kind == "emptyDir":
            folder.chmod(0o777)
        elif kind == "configMap":
            for key, text in configs[source["name"]].items():
                (folder / key).write_text(text)
        elif kind == "projected":
            for projection in source["sources"]:
                for item in projection["secret"]["items"]:
                    file = folder / item["path"]
                    file.parent.mkdir(exist_ok=True)
                    file.write_text(secrets[projection["secret"]["name"]][item["key"]])
                    os.chown(file, 0, spec["securityContext"]["fsGroup"])
                    file.chmod(source["defaultMode"])
        else:
            raise SystemExit(f"{name}: no folder stands for {kind}")
        volume.clear()
        volume.update({"name": name, "hostPath": {"path": str(folder), "type": "Directory"}})
    # podman takes the container's word; a kubelet gives each container what the pod says.
    [container] = spec["containers"]
    for field in ("runAsUser", "runAsGroup", "runAsNonRoot"):
        container["securityContext"][field] = spec["securityContext"][field]
    for field in ("imagePullSecrets", "tolerations", "affinity"):
        spec.pop(field, None)
    # The test looks at probes itself; registry and data are on the host, so the pod has its network and needs no
    # mapping of ports.
    for field in ("ports", "startupProbe", "livenessProbe", "readinessProbe"):
        container.pop(field, None)
    container["imagePullPolicy"] = "Never"
    spec["restartPolicy"] = "Never"
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": made["metadata"]["name"]}, "spec": spec}
    return pod, folders


@contextlib.contextmanager
def playing(pod, work):
    """The pod's container while it runs; afterwards the pod is gone."""
    file = work / "pod.json"
    file.write_text(json.dumps(pod))
    try:
        run(*PODMAN, "kube", "play", "--network", "host", file)
        yield f"{pod['metadata']['name']}-{pod['spec']['containers'][0]['name']}"
    finally:
        subprocess.run([*PODMAN, "kube", "down", file], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def play(pod, work):
    """Exit code and log of the pod's container, once it ended."""
    with playing(pod, work) as container:
        return int(run(*PODMAN, "wait", container)), logs(container)


def logs(container):
    done = subprocess.run([*PODMAN, "logs", container], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return done.stdout


def run(*command):
    command = [str(word) for word in command]
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    check(done.returncode == 0, f"{' '.join(command)}: {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def wait_for(port, process):
    for _ in range(200):
        check(process.poll() is None, "the registry ended")
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.05)
    raise SystemExit("the registry does not answer")


def check(holds, told):
    if not holds:
        raise SystemExit(f"tests/pod: {told}")
