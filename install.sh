#!/usr/bin/env bash
# Installs gpusched on this machine, upgrades it, or takes it away: see --help.
set -euo pipefail
umask 022 # every user runs the program, whatever root's umask is

readonly MIN_DRIVER=580 OLDEST_DRIVER=570
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
readonly here

usage() {
    cat <<'TEXT'
usage: sudo ./install.sh [--no-driver-check] [--no-criu | --criu-archive URL] [--root DIR]
       sudo ./install.sh --uninstall [--purge] [--root DIR]

Installs this checkout for all users of this machine: the program in /opt/gpusched (in an environment of its own),
the command /usr/local/bin/gpusched, the group gpusched, and, where systemd runs, the service gpusched, started. Where
this machine has no CRIU that works, one is made in /opt/gpusched/criu for the disk tier (see scripts/make_criu.sh
--help); where that is not possible it says why, and everything else works.
Run it again to upgrade: configuration, state and running models stay; only the daemon restarts, and models outlive it.

  --uninstall        remove the program and the service; keep configuration, state and logs
  --purge            with --uninstall: remove those and the group too
  --no-driver-check  install although there is no NVIDIA driver 580 or newer; the service is not started then
  --no-criu          look for no CRIU and make none
  --criu-archive URL the Debian archive to take it from; default: the first one in this machine's own package sources
  --root DIR         install below DIR, to look at it: no group, no service. The programs name DIR: do not move it
  --help             show this

Environment:
  GPUSCHED_VERSION   a tag of this checkout's own git repository (such as v0.1.0) to install instead of the working tree
  PYTHON             the interpreter, 3.11 or later; default: the first python3 that is, and that every user may run

Needs root (not with --root), Python with its venv module, and what pip is configured to install from.
TEXT
}

say() { printf '%s\n' "$*"; }

die() {
    printf 'install.sh: %s\n' "$*" >&2
    exit 1
}

# -- what is there --------------------------------------------------------------------------------

# Prints what is wrong with the interpreter $1; nothing where it is good. (-I: nothing of root's is taken from the
# directory that we are called in.)
python_problem() {
    "$1" -I - "$root" <<'PYTHON' 2>/dev/null || say "$1 is not there or does not run"
import os
import sys

version = ".".join(map(str, sys.version_info[:3]))
program = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
directories = [program]
while directories[-1] != "/":
    directories.append(os.path.dirname(directories[-1]))
if sys.version_info < (3, 11):
    print(f"{program} is Python {version}; gpusched needs 3.11 or later")
elif not sys.argv[1] and not all(os.stat(path).st_mode & 1 for path in directories):
    print(f"{program} is where other users cannot run it")
else:
    try:
        import ensurepip, venv
    except ImportError:
        print(f"{program} cannot make virtual environments: apt-get install python3-venv, or as your system calls it")
PYTHON
}

find_python() {
    local candidate problem problems=""
    # One that was named is used or refused, never replaced.
    for candidate in ${PYTHON:-python3 /usr/bin/python3 python3.14 python3.13 python3.12 python3.11}; do
        problem=$(python_problem "$candidate")
        if [[ -z $problem ]]; then
            command -v "$candidate"
            return
        fi
        problems+=$'\n'"  $problem"
    done
    die "no Python to use; install one, or name one: PYTHON=/path/to/python3.11$problems"
}

# Prints what is wrong with the NVIDIA driver; nothing where it is good.
driver_problem() {
    local version
    version=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null) ||
        version=$(cat /sys/module/nvidia/version 2>/dev/null) || version=""
    version=${version%%$'\n'*}
    if [[ -z $version ]]; then
        say "no NVIDIA driver answers here (see whether nvidia-smi works); gpusched needs $MIN_DRIVER or newer"
    elif [[ ! $version =~ ^[0-9]+(\.|$) ]]; then
        say "the NVIDIA driver's version is not understood: '$version'; gpusched needs $MIN_DRIVER or newer"
    elif ((10#${version%%.*} < OLDEST_DRIVER)); then
        say "NVIDIA driver $version cannot freeze processes; install $MIN_DRIVER or newer"
    elif ((10#${version%%.*} < MIN_DRIVER)); then
        say "NVIDIA driver $version is too old; install $MIN_DRIVER or newer" \
            "($OLDEST_DRIVER to $((MIN_DRIVER - 1)) work without migrate, with allow_old_driver = true in $config)"
    fi
}

has_systemd() { [[ -z $root && -d /run/systemd/system ]]; }

# Asks the daemon of this installation. Prints "frozen NAMES" or "running SOCKET"; nothing where none answers.
daemon_state() {
    [[ -x $venv/bin/python ]] || return 0
    "$venv/bin/python" -I - "$config" <<'PYTHON' || die "the daemon could not be asked what it manages; nothing was removed"
import sys
from pathlib import Path

from gpusched import GpuSched
from gpusched.config import load

file = Path(sys.argv[1])
socket = load(file if file.exists() else None, {}).socket_path
try:
    processes = GpuSched(str(socket), timeout_s=30).processes()
except ConnectionError:
    sys.exit()
settled = ("starting", "active", "failed", "dead")
frozen = [process["name"] for process in processes if process["state"] not in settled]
print("frozen " + ", ".join(frozen) if frozen else f"running {socket}")
PYTHON
}

# -- install --------------------------------------------------------------------------------------

# Copies what is to be installed to $1: building there leaves nothing of root's in somebody's checkout.
copy_source() {
    [[ -f $here/pyproject.toml && -f $here/packaging/gpusched.service ]] ||
        die "$here is no checkout of gpusched: run the install.sh of one"
    if [[ -z ${GPUSCHED_VERSION:-} ]]; then
        tar -C "$here" --exclude='./.*' --exclude=./build --exclude=./dist --exclude='*.egg-info' \
            --exclude=__pycache__ -cf - . | tar -C "$1" -xf -
        return
    fi
    # The checkout belongs to whoever called sudo; we run its code anyway.
    git -c safe.directory="$here" -C "$here" rev-parse --verify --quiet "refs/tags/$GPUSCHED_VERSION^{commit}" >/dev/null ||
        die "no tag $GPUSCHED_VERSION in the git repository $here (git fetch --tags; git tag lists them)"
    git -c safe.directory="$here" -C "$here" archive "refs/tags/$GPUSCHED_VERSION" | tar -C "$1" -xf -
}

make_directory() { # MODE PATH; mends mode and owner of one that is there
    install -d -m "$1" "$root$2"
    if ((EUID == 0)); then chown root:root "$root$2"; fi
}

make_environment() { # PYTHON
    # One whose interpreter is gone (the system's Python was upgraded) is made anew.
    if ! "$venv/bin/python" -I -m pip --version >/dev/null 2>&1; then
        "$1" -I -m venv --clear "$venv"
    fi
    "$venv/bin/python" -I -m pip --quiet --disable-pip-version-check --no-input install "$scratch"
}

write_config() {
    if [[ -e $config ]]; then
        say "kept $config"
        return
    fi
    cat >"$config" <<'TOML'
# Settings of the gpusched daemon; docs/configuration.md has every key. After a change: systemctl restart gpusched
# (running models outlive the daemon).

# Members may freeze, thaw and end everybody's processes, as root may. Everybody else: their own.
group = "gpusched"
TOML
}

# Prints "works PATH VERSION" of the CRIU that the daemon would take, or why it would have none.
criu_found() {
    "$venv/bin/python" -I - "$criu" <<'PYTHON'
import sys
from pathlib import Path

from gpusched.mechanisms.criu import program

found = program.find(private=Path(sys.argv[1]))
chosen = found.program
print(f"works {chosen.path} {'.'.join(map(str, chosen.version))}" if chosen else found.why_not)
PYTHON
}

# The disk tier's CRIU: the one that is there, where it works, else one of our own. Never fails: all else needs none.
provide_criu() {
    local found make_criu=$scratch/scripts/make_criu.sh
    [[ -z $no_criu && -e $make_criu ]] || return 0 # older versions have no disk tier
    found=$(criu_found) || found="it could not be looked for"
    if [[ $found != works* ]]; then
        say "Disk tier: $found. Making one in $criu."
        if "$make_criu" ${criu_archive:+--archive "$criu_archive"} "$criu"; then
            found=$(criu_found) || found="it could not be looked for"
        fi
    fi
    if [[ $found == works* ]]; then
        say "Disk tier: CRIU ${found#works } works."
    else
        say "No disk tier (hibernate, fork): $found. Everything else works. To have it, install CRIU 4.2 or newer, or" \
            "run this again with --criu-archive; gpusched doctor tries it out"
    fi
}

start_service() { # WHAT IS WRONG WITH THE DRIVER
    systemctl daemon-reload
    systemctl enable --quiet gpusched.service
    if [[ -n $1 ]]; then
        say "Not started: $1." "Then: systemctl restart gpusched"
        return
    fi
    systemctl restart gpusched.service || die "installed, but the service does not start: journalctl -u gpusched -n 30"
    say "The service gpusched runs (journalctl -u gpusched). Next: gpusched status"
}

do_install() {
    local python problem link=$root/usr/local/bin/gpusched
    python=$(find_python)
    problem=$(driver_problem)
    if [[ -n $problem && -z $no_driver_check ]]; then
        die "$problem; nothing was installed (--no-driver-check installs anyway, make demo needs no GPU)"
    fi
    if [[ -e $link && $(readlink "$link") != "$venv/bin/gpusched" ]]; then
        die "$link is another program; move it away first"
    fi
    scratch=$(mktemp -d)
    trap 'rm -rf "$scratch"' EXIT
    copy_source "$scratch"

    if [[ -z $root ]]; then getent group gpusched >/dev/null || groupadd --system gpusched; fi
    make_directory 0755 /opt/gpusched
    make_directory 0700 /var/lib/gpusched
    make_directory 0711 /var/log/gpusched
    make_directory 0755 /etc/gpusched
    make_environment "$python"
    provide_criu
    write_config
    mkdir -p "$root/usr/local/bin" "${unit%/*}"
    ln -sfn "$venv/bin/gpusched" "$link"
    install -m 0644 "$scratch/packaging/gpusched.service" "$unit"
    install -m 0755 "$scratch/install.sh" "$root/opt/gpusched/install.sh" # so that --uninstall needs no checkout

    say "Installed $("$link" --version) in $root/opt/gpusched."
    if has_systemd; then
        start_service "$problem"
    elif [[ -z $root ]]; then
        say "systemd does not run here. Start the daemon with: sudo gpusched daemon --backend cuda" \
            "(one that runs already: end it first; running models outlive it)"
    fi
}

# -- uninstall ------------------------------------------------------------------------------------

# Dies where the contents of a process that lives are in the daemon's pool $1: it alone can bring them back.
require_empty_pool() {
    local manifest pid pool=$1
    for manifest in "$pool"/process-*.json; do
        pid=${manifest##*/process-}
        pid=${pid%%-*}
        if [[ -e $manifest && -d /proc/$pid ]]; then
            die "pid $pid is frozen, and what it had on the GPU is in $pool: start the daemon and thaw (or kill) it first; nothing was removed"
        fi
    done
}

do_uninstall() {
    local found link=$root/usr/local/bin/gpusched pool=$root/var/lib/gpusched/pool
    found=$(daemon_state)
    if [[ $found == frozen* ]]; then
        die "still ${found/ /: }. Without the daemon nobody can thaw them: gpusched thaw (or kill) them first; nothing was removed"
    fi
    [[ -n $found ]] || require_empty_pool "$pool"
    if has_systemd && [[ -e $unit ]]; then
        systemctl disable --quiet --now gpusched.service # KillMode=process: managed processes run on
        found=$(daemon_state)
    fi
    if [[ $found == running* ]]; then
        die "a daemon still serves ${found#running }: end it first (the processes that it manages run on); nothing was removed"
    fi
    rm -f "$unit"
    if has_systemd; then systemctl daemon-reload; fi
    if [[ $(readlink "$link") == "$venv/bin/gpusched" ]]; then rm -f "$link"; fi
    rm -rf "$root/opt/gpusched"
    if mountpoint --quiet "$pool"; then umount "$pool"; fi # of a daemon that was killed
    if [[ -z $purge ]]; then
        say "Removed gpusched. Kept: $root/etc/gpusched $root/var/lib/gpusched $root/var/log/gpusched" \
            "(--uninstall --purge removes them)"
        return
    fi
    rm -rf "$root/etc/gpusched" "$root/var/lib/gpusched" "$root/var/log/gpusched"
    if [[ -z $root ]] && getent group gpusched >/dev/null; then groupdel gpusched; fi
    say "Removed gpusched with its configuration, state and logs."
}

# -- the command line -----------------------------------------------------------------------------

main() {
    local action=install
    root="" purge="" no_driver_check="" no_criu="" criu_archive=""
    while (($#)); do
        case $1 in
        --help | -h) usage && return ;;
        --uninstall) action=uninstall ;;
        --purge) purge=yes ;;
        --no-driver-check) no_driver_check=yes ;;
        --no-criu) no_criu=yes ;;
        --criu-archive)
            [[ -n ${2:-} ]] || die "--criu-archive needs an address"
            criu_archive=$2
            shift
            ;;
        --root)
            [[ -n ${2:-} ]] || die "--root needs a directory"
            mkdir -p "$2"
            root=$(cd "$2" && pwd)
            shift
            ;;
        *) die "unknown option $1 (see --help)" ;;
        esac
        shift
    done
    [[ -z $purge || $action == uninstall ]] || die "--purge goes with --uninstall"
    ((EUID == 0)) || [[ -n $root ]] || die "needs root: sudo $0"
    [[ $root != / ]] || root=""
    unset GPUSCHED_SOCKET # the configuration says where this installation's daemon listens
    venv=$root/opt/gpusched/venv criu=$root/opt/gpusched/criu config=$root/etc/gpusched/config.toml unit=$root/etc/systemd/system/gpusched.service
    case $action in
    install) do_install ;;
    uninstall) do_uninstall ;;
    esac
}

main "$@"
exit
