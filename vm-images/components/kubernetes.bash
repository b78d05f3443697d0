# shellcheck shell=bash disable=SC2034,SC2154
# What every Kubernetes release has in common; a release's own `recipe` says
# only when it was released. Tags and stamps are those of upstream's
# hack/lib/golang.sh and hack/lib/version.sh.
#
# Another release: copy a folder, change the version in `require` and in each
# staging `replace` (v1.N.P -> v0.N.P), run `go mod tidy`.
module=k8s.io/kubernetes
tags=selinux,notest,grpcnotrace

kubernetes_stamps() {
	local minor=${version#v1.} package
	minor=${minor%%.*}
	for package in k8s.io/component-base/version k8s.io/client-go/pkg/version; do
		printf -- '-X %s=%s ' \
			"$package.gitVersion" "$version" \
			"$package.gitMajor" 1 \
			"$package.gitMinor" "$minor" \
			"$package.gitCommit" unknown \
			"$package.gitTreeState" clean \
			"$package.buildDate" "$released"
	done
}
version=$(version_of "$module")
ldflags=$(kubernetes_stamps)
probe[kubectl]='version --client'
probe[kubeadm]='version -o short'
