# shellcheck shell=bash disable=SC2154
# The container images that nodes bring along, and the containerd root that they are unpacked into.

container_names=(pause coredns flannel testbox)

# What each image is called; the operator's add-ons use these names.
container_reference() {
	case $1 in
	pause | testbox) printf 'localhost/kubernest-%s:1\n' "$1" ;;
	coredns) printf 'localhost/kubernest-coredns:v1.13.2\n' ;;
	flannel) printf 'localhost/kubernest-flannel:v0.28.4\n' ;;
	esac
}

container_archive() {
	local name=$1 archive base=
	case $name in flannel) base=$(base_archive) ;; esac
	archive=$cache/images/$name-$({
		content "$here/images/$name" "$here/lib/containers.bash"
		printf '%s\n' "$base"
		case $name in
		coredns | flannel) basename "$(component "$name")" ;;
		pause) dpkg-query -W catatonit ;;
		testbox) dpkg-query -W libc6 && apt-cache policy busybox | sed -n 's/ *Candidate/busybox/p' ;;
		esac
	} | key).tar
	cached "$archive" container_build "$name" "$base"
	ln -sfn "$(basename "$archive")" "$cache/images/$name.tar"
	printf '%s\n' "$archive"
}

container_images() {
	local name
	for name in "${container_names[@]}"; do
		printf '%s %s\n' "$(container_reference "$name")" "$(container_archive "$name")"
	done
}

# container_build NAME BASE ARCHIVE
container_build() {
	local name=$1 base=$2 command context=$scratch/context-$1 root=$scratch/flannel-root
	cp -a "$here/images/$name" "$context"
	case $name in
	coredns) cp "$(component coredns)/bin/coredns" "$context/" ;;
	pause) cp "$(command -v catatonit)" "$context/" ;;
	flannel)
		cp "$(component flannel)/bin/flanneld" "$context/"
		mkdir "$root"
		tar -C "$root" -xf "$base"
		closure "$root" "$context/rootfs" /usr/sbin/nft /usr/sbin/xtables-nft-multi
		cp -a "$root/usr/lib/x86_64-linux-gnu/xtables" "$context/rootfs/usr/lib/x86_64-linux-gnu/"
		# flanneld tidies up both kinds of rules whatever it is told to use.
		for command in iptables iptables-{restore,save} ip6tables ip6tables-{restore,save}; do
			ln -s xtables-nft-multi "$context/rootfs/usr/sbin/$command"
		done
		cp "$root/etc/protocols" "$context/rootfs/etc/" 2>/dev/null || true
		rm -rf "$root"
		;;
	testbox) testbox_root "$context/rootfs" ;;
	esac
	oci_build "$context" "$(container_reference "$name")" "$3"
}

# closure ROOT TARGET PROGRAM…: copies programs of ROOT with the shared libraries they need.
closure() {
	local root=$1 target=$2 file
	shift 2
	mkdir -p "$target"/{etc,run,tmp,proc,sys,dev,usr/sbin,usr/bin,usr/lib/x86_64-linux-gnu,usr/lib64}
	ln -sfn usr/lib "$target/lib"
	ln -sfn usr/lib64 "$target/lib64"
	ln -sfn usr/sbin "$target/sbin"
	ln -sfn usr/bin "$target/bin"
	for file in "$@" $(chroot "$root" ldd "$@" | grep -oE '/[^ )]+\.so[^ )]*' | sort -u); do
		cp -L "$root$file" "$target$file"
	done
}

# testbox_root TARGET: busybox with the C library of this machine, which is of the same Debian release.
testbox_root() {
	local target=$1 applet
	mkdir -p "$scratch/busybox"
	(cd "$scratch/busybox" && apt-get -o APT::Sandbox::User=root download busybox >&2 && dpkg-deb --extract ./*.deb .)
	mkdir -p "$scratch/testbox-root"
	closure / "$target" "$(readlink -f "$scratch/busybox/bin/busybox")" 2>/dev/null || true
	rm -rf "$target/root"
	install -D "$scratch/busybox/bin/busybox" "$target/usr/bin/busybox"
	for applet in $(chroot "$target" /usr/bin/busybox --list); do
		[[ $applet == busybox ]] || ln -s busybox "$target/usr/bin/$applet"
	done
	printf 'root:x:0:0:root:/:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/sh\n' >"$target/etc/passwd"
	printf 'root:x:0:\nnogroup:x:65534:\n' >"$target/etc/group"
}

# oci_build CONTEXT REFERENCE ARCHIVE: CONTEXT's Containerfile, as an OCI archive with one uncompressed layer.
# Storage of its own, so that nothing is left behind; the times are fixed, so that the same content has the same digest.
oci_build() {
	local context=$1 reference=$2 archive=$3 storage
	storage=(--root "$scratch/storage" --runroot "$scratch/storage-run" --storage-driver vfs)
	buildah "${storage[@]}" bud --quiet --isolation chroot --format oci --timestamp 0 --tag "$reference" "$context" >&2
	buildah "${storage[@]}" push --quiet --disable-compression "$reference" "oci-archive:$archive:$reference" >&2
	rm -rf "$scratch/storage" "$scratch/storage-run" "$context"
}

container_store() {
	local store names=() name archives=()
	for name in "${container_names[@]}"; do
		archives+=("$(container_archive "$name")")
		names+=("$(basename "${archives[-1]}")")
	done
	store=$cache/node-image/containers-$({
		content "$here/lib/containers.bash"
		basename "$(component containerd)"
		printf '%s\n' "${names[@]}"
	} | key).tar
	cached "$store" store_build "${archives[@]}"
	printf '%s\n' "$store"
}

# store_build ARCHIVE… TAR: imports the images with a containerd of our own and packs what it then has on disk.
store_build() {
	local root=$scratch/containers bin target=${*: -1} daemon archive reference
	bin=$(component containerd)/bin
	mkdir -p "$root"
	cat >"$scratch/containerd.toml" <<TOML
version = 3
root = "$root"
state = "$scratch/containerd"
disabled_plugins = [
  "io.containerd.cri.v1.images", "io.containerd.cri.v1.runtime", "io.containerd.grpc.v1.cri",
  "io.containerd.snapshotter.v1.blockfile", "io.containerd.snapshotter.v1.btrfs",
  "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.erofs",
  "io.containerd.snapshotter.v1.native", "io.containerd.snapshotter.v1.zfs", "io.containerd.nri.v1.nri",
]
[grpc]
  address = "$scratch/containerd.sock"
[ttrpc]
  address = "$scratch/containerd.sock.ttrpc"
[plugins.'io.containerd.internal.v1.opt']
  path = "$scratch/opt"
TOML
	PATH=$bin:$PATH "$bin/containerd" --config "$scratch/containerd.toml" >"$scratch/containerd.log" 2>&1 &
	daemon=$!
	until "$bin/ctr" -a "$scratch/containerd.sock" version >/dev/null 2>&1; do
		kill -0 "$daemon" 2>/dev/null || die "containerd ended: $(tail -n 3 "$scratch/containerd.log")"
		sleep 0.2
	done
	set -- "${@:1:$#-1}"
	for archive; do
		"$bin/ctr" -a "$scratch/containerd.sock" -n k8s.io images import --local --discard-unpacked-layers \
			--snapshotter overlayfs "$archive" >&2
	done
	for reference in $("$bin/ctr" -a "$scratch/containerd.sock" -n k8s.io images list -q); do
		"$bin/ctr" -a "$scratch/containerd.sock" -n k8s.io images label "$reference" \
			io.cri-containerd.image=managed io.cri-containerd.pinned=pinned >/dev/null
	done
	kill "$daemon"
	wait "$daemon" || true
	# Of plugins that keep nothing here, and uploads that are over.
	find "$root" -mindepth 1 -maxdepth 1 ! -name 'io.containerd.content.*' ! -name 'io.containerd.metadata.*' \
		! -name 'io.containerd.snapshotter.v1.overlayfs' -exec rm -rf {} +
	rm -rf "$root/io.containerd.content.v1.content/ingest"
	basename "$target" .new >"$root/seed-id"
	tar -C "$root" --sort=name --numeric-owner --xattrs -cf "$target" .
}
