#!/usr/bin/env bash
# Puts a CRIU of its own below a directory, with its own C library, and touches nothing else: see --help.
set -euo pipefail
umask 022

# The first suite that has it wins. Kernels from 6.16 on need 4.2.
readonly SUITES="forky sid" KEYRING=/usr/share/keyrings/debian-archive-keyring.gpg
readonly LIMIT_S=120 # of everything that asks the archive

usage() {
    cat <<'TEXT'
usage: scripts/make_criu.sh [--archive URL] [PREFIX]

Makes PREFIX/bin/criu (PREFIX: .criu) from the signed packages of a Debian archive. The system is left as it is: apt
works on a state of its own, the packages are unpacked and not installed. PREFIX/VERSION says what it is. Where
PREFIX/bin/criu runs already nothing is done; remove PREFIX to have it made anew.

  --archive URL   the Debian archive to take it from; default: the first one in this machine's own package sources

Needs apt-get, dpkg-deb and the archive's keys (package debian-archive-keyring). Not root.
TEXT
}

say() { printf '%s\n' "$*"; }

die() {
    printf 'make_criu.sh: %s\n' "$*" >&2
    exit 1
}

# Prints the address of a Debian archive that this machine takes packages from; nothing where there is none.
archive_of_this_machine() {
    local origin uri
    # shellcheck disable=SC2016 # apt-get fills these in, not the shell
    while IFS='|' read -r origin uri; do
        [[ $uri != *-security/ ]] || continue
        # Before the first apt-get update nobody knows whose archive it is; the keys below tell.
        if [[ $origin == Debian || (-z $origin && $uri == */debian/) ]]; then
            say "$uri"
            return
        fi
    done < <(apt-get indextargets --format '$(ORIGIN)|$(REPO_URI)' 'Created-By: Packages')
}

# apt-get with sources, lists and cache below $work, and with nothing installed.
private_apt() {
    timeout "$LIMIT_S" apt-get -q \
        -o Dir::State="$work/state" -o Dir::State::lists="$work/state/lists" -o Dir::State::status="$work/status" \
        -o Dir::Cache="$work/cache" -o Dir::Etc::sourcelist="$work/sources.list" -o Dir::Etc::sourceparts=/dev/null \
        -o Dir::Etc::preferencesparts=/dev/null -o Dir::Etc::preferences=/dev/null -o APT::Install-Recommends=false \
        -o APT::Sandbox::User="$(id -un)" -o Debug::NoLocking=true -o Acquire::Languages=none -o Acquire::Retries=1 "$@"
}

last_lines() { tail -n 3 "$work/log" | sed 's/^/  /'; }

# Gets the packages of one suite into $work/packages. Fails where the suite has no CRIU or cannot be reached.
download() { # ARCHIVE SUITE
    local names
    say "deb [signed-by=$KEYRING] $1 $2 main" >"$work/sources.list"
    rm -rf "$work/state/lists" "$work/packages"
    mkdir -p "$work/state/lists/partial" "$work/cache/archives/partial" "$work/packages"
    private_apt update -o APT::Update::Error-Mode=any >"$work/log" 2>&1 || return 1
    names=$(private_apt -s install criu 2>"$work/log" | awk '/^Inst (criu|lib)/ {print $2}')
    [[ -n $names ]] || return 1
    # shellcheck disable=SC2086 # one word a package
    (cd "$work/packages" && private_apt download $names) >"$work/log" 2>&1
}

unpack() {
    local package loader
    mkdir -p "$made/root" "$made/bin"
    for package in "$work"/packages/*.deb; do
        # Newer packages have /usr/lib alone; older ones would put files beside the links that they rely on.
        dpkg-deb --fsys-tarfile "$package" | tar -x -C "$made/root" --no-same-owner --exclude=./usr/share
    done
    loader=$(cd "$made/root" && find usr/lib -name 'ld-linux*.so.*' -path '*-linux-gnu*' | head -n 1)
    [[ -n $loader && -x $made/root/usr/sbin/criu ]] || die "the packages are not laid out as expected"
    cat >"$made/bin/criu" <<WRAPPER
#!/bin/sh
# Made by make_criu.sh: CRIU with the libraries that it was built for.
root=\$(dirname "\$(readlink -f "\$0")")/../root
exec "\$root/$loader" --argv0 criu --library-path "\$root/${loader%/*}" "\$root/usr/sbin/criu" "\$@"
WRAPPER
    chmod 0755 "$made/bin/criu"
}

main() {
    local archive="" prefix="" suite tried="" version
    while (($#)); do
        case $1 in
        --help | -h) usage && return ;;
        --archive)
            [[ -n ${2:-} ]] || die "--archive needs an address"
            archive=$2
            shift
            ;;
        -*) die "unknown option $1 (see --help)" ;;
        *)
            [[ -z $prefix ]] || die "one PREFIX only (see --help)"
            prefix=$1
            ;;
        esac
        shift
    done
    prefix=${prefix:-.criu}
    if [[ -f $prefix/VERSION ]] && "$prefix/bin/criu" --version >/dev/null 2>&1; then
        say "$prefix/bin/criu is there: $(<"$prefix/VERSION")"
        return
    fi
    [[ -n $(command -v apt-get) && -n $(command -v dpkg-deb) ]] ||
        die "no apt-get and dpkg-deb here: install CRIU 4.2 or newer otherwise, and name it: GPUSCHED_CRIU=/path/to/criu"
    [[ -r $KEYRING ]] || die "$KEYRING is missing: apt-get install debian-archive-keyring"
    [[ -n $archive ]] || archive=$(archive_of_this_machine)
    [[ -n $archive ]] ||
        die "this machine's package sources name no Debian archive: name one (--archive URL; make criu ARCHIVE=URL)"

    mkdir -p "$(dirname "$prefix")"
    prefix=$(cd "$(dirname "$prefix")" && pwd)/$(basename "$prefix")
    work=$(mktemp -d) made=$(mktemp -d "$prefix.XXXXXX")
    trap 'rm -rf "$work" "$made"' EXIT
    : >"$work/status"
    for suite in $SUITES; do
        if download "$archive" "$suite"; then break; fi
        tried+=$'\n'"$suite:"$'\n'"$(last_lines)"
        suite=""
    done
    [[ -n $suite ]] || die "$archive gives no CRIU:$tried"
    unpack
    version=$("$made/bin/criu" --version 2>&1 | awk '/^Version:/ {print $2}')
    [[ -n $version ]] || die "the CRIU of $suite does not run here: $("$made/bin/criu" --version 2>&1 | tail -n 1)"
    say "$version ($suite, $(dpkg --print-architecture))" >"$made/VERSION"
    chmod 0755 "$made"
    rm -rf "$prefix"
    mv -T "$made" "$prefix"
    say "$prefix/bin/criu: $(<"$prefix/VERSION")"
}

main "$@"
exit
