# shellcheck shell=bash
# Debian packages without installing them: an apt of our own (source list, lists, cache, empty dpkg status) that
# takes its mirror, keys and proxies from how the machine is set up, and changes nothing on it.

cache_root() { printf '%s\n' "${QMPVCPU_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/qmpvcpu}"; }

say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }
die() { say "$*"; exit 1; }

is_debian() { [ -r /etc/os-release ] && grep -Eq '^ID(_LIKE)?=.*debian' /etc/os-release && command -v apt-get >/dev/null; }

# The main archive this machine already uses. `indextargets` reads sources.list and *.sources alike. Only Debian's own
# whole releases count: security and backports may live elsewhere. Before the first `apt-get update` apt does not know
# whose an archive is: then a path that ends in /debian is believed first.
debian_mirror() {
    local format='$(CREATED_BY)|$(COMPONENT)|$(RELEASE)|$(ORIGIN)|$(REPO_URI)'
    { apt-get indextargets --format "$format"; apt-get indextargets --no-release-info --format "$format"; } 2>/dev/null |
        awk -F'|' '$1 != "Packages" || $2 != "main" { next }
            $3 !~ /^(bookworm|trixie|forky|sid|oldstable|stable|testing|unstable)$/ { next }
            { rank = $4 == "Debian" ? 0 : $4 !~ /^\$/ ? 9 : $5 ~ /\/debian\/?$/ ? 1 : 2 }
            rank < 9 && (best == "" || rank < low) { best = $5; low = rank }
            END { print best }'
}

# Enter one at a time, for as long as this program runs; waits for another that does the same work.
enter() { # enter LOCK-FILE WHAT
    exec 9>>"$1" # appending, so that what is locked keeps its contents
    flock -n 9 && return
    say "waiting for another run that makes $2"
    flock -w 1800 9 || die "another run has been making $2 for half an hour: see who holds $1"
}

# apt_init DIR ARCH SUITE...: afterwards `apt_own COMMAND...` runs against these suites only; ARCH "source" means their
# source packages. Fails where the mirror cannot serve them now (a mirror in the middle of its sync answers with lists
# that do not match): try another suite.
apt_init() {
    local dir=$1 arch=$2 kind=deb mirror suite keyring=/usr/share/keyrings/debian-archive-keyring.gpg
    shift 2
    if [ "$arch" = source ]; then arch=$(dpkg --print-architecture) kind=deb-src; fi
    is_debian || die "this needs Debian's apt; on another system build or install QEMU and guests yourself"
    mirror=$(debian_mirror)
    [ -n "$mirror" ] || die "no Debian archive in this machine's apt sources"
    [ -r "$keyring" ] || die "Debian's keys are missing: apt-get install debian-archive-keyring"
    APT_DIR=$dir
    rm -rf "$dir"
    mkdir -p "$dir"/{etc/parts,lists/partial,cache/archives/partial}
    : >"$dir/status"
    for suite; do
        printf '%s [signed-by=%s] %s %s main\n' "$kind" "$keyring" "$mirror" "$suite"
    done >"$dir/etc/sources.list"
    APT_OWN=(
        -o "Dir::Etc::sourcelist=$dir/etc/sources.list" -o "Dir::Etc::sourceparts=$dir/etc/parts"
        -o "Dir::Etc::preferences=$dir/etc/preferences" -o "Dir::Etc::preferencesparts=$dir/etc/parts"
        -o "Dir::State=$dir" -o "Dir::State::lists=$dir/lists" -o "Dir::State::status=$dir/status"
        -o "Dir::State::extended_states=$dir/extended" -o "Dir::Cache=$dir/cache"
        -o "Dir::Cache::archives=$dir/cache/archives" -o "APT::Architecture=$arch" -o "APT::Architectures::=$arch"
        -o "APT::Install-Recommends=0" -o "Acquire::Retries=3" -o "Acquire::http::Timeout=60"
        -o "Acquire::https::Timeout=60" -o "Acquire::Languages=none" -o "Acquire::IndexTargets::deb::Contents-deb::DefaultEnabled=false"
        -o "Debug::NoLocking=1" -o "APT::Sandbox::User=" -o "Dir::Log=$dir" -o "APT::Get::List-Cleanup=0"
        -o "Binary::apt-get::APT::Keep-Downloaded-Packages=true" -o "APT::Keep-Downloaded-Packages=true"
        -o "DPkg::Post-Invoke::=" -o "APT::Update::Post-Invoke::=" -o "APT::Update::Error-Mode=any"
    )
    # The machine's hooks (docker-clean …) would empty our archive folder.
    {
        printf '#clear DPkg::Post-Invoke;\n#clear APT::Update::Post-Invoke;\n'
        printf '#clear APT::Update::Post-Invoke-Success;\n#clear APT::Architectures;\n'
    } >"$dir/etc/clear.conf"
    apt_own update -qq >"$dir/update.log" 2>&1 && return 0
    say "the package lists of $* ($arch) cannot be had now: $(grep '^E:' "$dir/update.log" | head -n 1 | sed 's#[a-z]*://[^ ]*##g')"
    return 1
}

apt_own() { apt-get -c "$APT_DIR/etc/clear.conf" "${APT_OWN[@]}" "$@"; }
apt_own_cache() { apt-cache -c "$APT_DIR/etc/clear.conf" "${APT_OWN[@]}" "$@"; }
