# shellcheck shell=bash disable=SC2154
# Puts a node image together: root file system, initrd, disk, OCI archive.

# Programs of each component that a node runs.
kubernetes_programs=(kube-apiserver kube-controller-manager kube-scheduler kube-proxy kubelet)
etcd_programs=(etcd)
containerd_programs=(containerd containerd-shim-runc-v2)

# node_archive VERSION BASE STORE KUBERNETES_BIN ETCD_BIN CONTAINERD_BIN ARCHIVE
node_archive() {
	local version=$1 base=$2 store=$3 kubernetes=$4 etcd=$5 containerd=$6 archive=$7
	local root=$scratch/root context=$scratch/node program
	mkdir -p "$root" "$context/disk" "$context/boot"
	tar -C "$root" --xattrs -xf "$base"
	cp -a --no-preserve=ownership "$here/rootfs/." "$root/"
	mkdir -p "$root/usr/local/bin" "$root/usr/share/kubernest/containerd" \
		"$root/usr/libexec/kubernetes/kubelet-plugins/volume/exec"
	for program in "${kubernetes_programs[@]}"; do install -m 755 "$kubernetes/$program" "$root/usr/local/bin/"; done
	for program in "${etcd_programs[@]}"; do install -m 755 "$etcd/$program" "$root/usr/local/bin/"; done
	for program in "${containerd_programs[@]}"; do install -m 755 "$containerd/$program" "$root/usr/local/bin/"; done
	install -m 755 "$guest" "$root/usr/local/bin/kubernest-guest"
	tar -C "$root/usr/share/kubernest/containerd" --xattrs -xf "$store"
	ln -sfn kubernest.target "$root/usr/lib/systemd/system/default.target"
	printf 'KUBERNEST_NODE_IMAGE=%s\n' "$(basename "$archive" .tar.new)" >>"$root/usr/lib/os-release"

	mv "$root/boot/vmlinuz" "$context/boot/vmlinuz"
	initrd "$root" "$context/boot/initrd.img"
	disk "$root" "$context/disk/node.qcow2"
	rm -rf "$root"
	cp "$here/Containerfile" "$context/"
	oci_build "$context" "localhost/kubernest-node:$version" "$archive"
}

# initrd ROOT FILE: busybox, the drivers of modules.list with what they depend on, and init. Not compressed: unpacking
# would cost an emulated processor more than reading.
initrd() {
	local root=$1 file=$2 tree=$scratch/initrd release module path applet
	release=$(basename "$root"/usr/lib/modules/*)
	mkdir -p "$tree"/{bin,dev,proc,sys,root,modules}
	install -m 755 "$here/initrd/init" "$tree/init"
	install -m 755 "$root/usr/bin/busybox" "$tree/bin/busybox"
	for applet in sh mount insmod findfs mkdir switch_root poweroff; do ln -s busybox "$tree/bin/$applet"; done
	sed 's/#.*//; /^$/d' "$here/initrd/modules.list" | while read -r module; do
		modprobe --dirname "$root/usr" --set-version "$release" --show-depends "$module"
	done | awk '$1 == "insmod" && !seen[$2]++ { print $2 }' >"$scratch/modules"
	while read -r path; do
		cp "$path" "$tree/modules/"
		basename "$path"
	done <"$scratch/modules" >"$tree/modules/order"
	(cd "$tree" && find . -print0 | LC_ALL=C sort -z | cpio --quiet --null --create --format=newc --owner=0:0) >"$file"
	rm -rf "$tree"
}

# disk ROOT FILE: ext4 without a journal, as it is never written, in a compressed qcow2: the emulator unpacks it with
# the host's speed, which a compressed file system in the guest could not.
disk() {
	local root=$1 file=$2 raw=$scratch/node.raw size
	size=$(du -sm --apparent-size "$root" | cut -f1)
	truncate -s "$((size * 115 / 100 + 48))M" "$raw"
	mkfs.ext4 -q -F -L kubernest-root -m 0 -O ^has_journal,^resize_inode -E nodiscard -d "$root" "$raw"
	qemu-img convert -c -O qcow2 -o compression_type=zstd,cluster_size=64k -W -m 4 "$raw" "$file"
	rm -f "$raw"
}
