# shellcheck shell=bash disable=SC2154
# The bill of materials, sourced by `build`: what we build (from go.mod, go.sum
# and each module's LICENSE) and what comes from Debian (from each package's
# copyright file). It records no hash of a binary: that depends on the compiler.

manifest_json=$here/components.json
manifest_text=$here/COMPONENTS.md

# manifest_write: writes both files.
manifest_write() {
	local built packages json
	built=$(go_rows)
	packages=$(debian_rows)
	json=$(manifest_render "$built" "$packages")
	printf '%s\n' "$json" >"$manifest_json"
	manifest_markdown <<<"$json" >"$manifest_text"
	printf 'wrote %s and %s\n' "$manifest_json" "$manifest_text"
}

# manifest_check: what we build must be told exactly. Debian's rows are as of
# the last --manifest: they must name the listed packages, but a newer version
# in the archive makes no committed file wrong.
manifest_check() {
	local built packages listed json
	built=$(go_rows)
	packages=$(jq '.packages' "$manifest_json" 2>/dev/null || echo '[]')
	json=$(manifest_render "$built" "$packages")
	listed=$(debian_list | cut -f1,2,4 | LC_ALL=C sort)
	if [[ $json != "$(cat "$manifest_json" 2>/dev/null)" ]] ||
		[[ $(manifest_markdown <<<"$json") != "$(cat "$manifest_text" 2>/dev/null)" ]] ||
		[[ $(jq -r '.[] | [.name, .suite, .use] | @tsv' <<<"$packages" | LC_ALL=C sort) != "$listed" ]]; then
		diff -u --label committed --label current "$manifest_json" - <<<"$json" >&2 || true
		die "the manifest is stale; run: ${BASH_SOURCE[1]} --manifest"
	fi
	echo 'the manifest is current'
}

manifest_render() {
	jq -n --argjson components "$1" --argjson packages "$2" \
		'{components: $components, packages: $packages}'
}

# go_rows: one object a component.
go_rows() {
	local row modules linked
	for row in "${components[@]}"; do
		load "$row"
		modules=$(go_modules)
		linked=$(linked_licences)
		jq -n --arg name "$component" --arg version "$version" --argjson cgo "$cgo" \
			--argjson modules "$modules" --argjson linked "$linked" '{
				name: $name, version: $version,
				licence: ($modules | map(.licence) | unique | join(" AND ")),
				cgo: ($cgo == 1), modules: $modules, linked: $linked}'
	done | jq -s .
}

# go_modules: the modules of the component's own main packages, each with its
# checksum and the binaries that it gives.
go_modules() {
	local package name path at directory sum licence
	while read -r name package; do
		in_component go list -tags "$tags" \
			-f "$name {{.Module.Path}} {{.Module.Version}} {{.Module.Dir}}" "$package"
	done < <(binaries | LC_ALL=C sort) | while read -r name path at directory; do
		sum=$(sum_of "$path" "$at")
		licence=$(licence_of_module "$directory")
		jq -n --arg binary "$name" --arg path "$path" --arg version "$at" \
			--arg sum "$sum" --arg licence "$licence" \
			'{path: $path, version: $version, sum: $sum, licence: $licence, binary: $binary}'
	done | jq -s 'group_by(.path) | map(.[0] + {binaries: map(.binary)} | del(.binary))'
}

# sum_of MODULE VERSION: what the component's go.sum holds the module's files to.
sum_of() {
	awk -v module="$1" -v version="$2" \
		'$1 == module && $2 == version { print $3; found = 1 } END { exit !found }' \
		"$here/$component/go.sum"
}

# linked_licences: how many linked modules stand under each licence.
linked_licences() {
	local path directory
	in_component go list -deps -tags "$tags" \
		-f '{{with .Module}}{{.Path}} {{if .Replace}}{{.Replace.Dir}}{{else}}{{.Dir}}{{end}}{{end}}' tool |
		LC_ALL=C sort -u | while read -r path directory; do
		licence_of_module "$directory" || die "$component links $path"
	done | LC_ALL=C sort | uniq -c |
		jq -Rn '[inputs | capture("^ *(?<count>[0-9]+) (?<licence>.*)$") | {(.licence): (.count | tonumber)}] | add'
}

in_component() {
	(cd "$here/$component" && env "${environment[@]}" "$@")
}

# licence_of_module DIRECTORY: SPDX identifiers of the licence files of its
# code (LICENSE.docs, where there is one, is that of the documentation alone).
licence_of_module() {
	local file found
	found=$(find "$1" -maxdepth 1 -type f \( -iname 'licen[cs]e*' -o -iname 'copying*' \) ! -iname '*.docs' ! -iname '*.csv' |
		while read -r file; do spdx_of_text "$file"; done | LC_ALL=C sort -u)
	[[ -n $found ]] || die "$1 has no licence file"
	paste -sd' ' <<<"$found" | sed 's/ / AND /g'
}

# spdx_of_text FILE: recognises a licence by the words that only it has. The
# first that fits counts, so a longer licence's text comes before what it quotes.
spdx_of_text() {
	tr -s '[:space:]#*/' ' ' <"$1" | awk '
		function has(words) { return index(text, words) }
		{ text = tolower($0) }
		has("apache license") && has("version 2.0, january 2004") { print "Apache-2.0"; next }
		has("mozilla public license") && has("version 2.0")       { print "MPL-2.0"; next }
		has("gnu affero general public license")                  { print "AGPL-3.0-only"; next }
		has("gnu lesser general public license")                  { print "LGPL-3.0-only"; next }
		has("gnu general public license")                         { print "GPL-3.0-only"; next }
		has("permission is hereby granted, free of charge")       { print "MIT"; next }
		has("permission to use, copy, modify, and")               { print "ISC"; next }
		has("redistribution and use in source and binary forms") {
			print has("neither the name") ? "BSD-3-Clause" : "BSD-2-Clause"; next
		}
		has("under the apache license, version 2.0")              { print "Apache-2.0"; next }
		has("under the apache 2 license")                         { print "Apache-2.0"; next }
		{ exit 1 }' || die "manifest.bash does not recognise the licence in $1"
}

# debian_list: "<package>\t<suite>\t<licence or ->\t<use>" of each listed package.
debian_list() {
	sed -E '/^(#|$)/d; s/^([^ ]+) +([^ ]+) +([^ ]+) +/\1\t\2\t\3\t/' "$here/debian-packages"
}

# debian_rows: an installed package is asked; another is fetched and looked into.
debian_rows() {
	local package suite licence use at own
	own=$(sed -n "s/^VERSION_CODENAME=//p" /etc/os-release)
	scratch=$(mktemp -d)
	trap 'rm -rf "$scratch"' EXIT
	debian_list | while IFS=$'\t' read -r package suite licence use; do
		if [[ $suite == "$own" ]] && at=$(dpkg-query -W -f '${Version}' "$package" 2>/dev/null) && [[ -n $at ]]; then
			cp "/usr/share/doc/$package/copyright" "$scratch/copyright"
		else
			debian_fetch "$package" "$suite" "$own"
			at=$(dpkg-deb -f "$scratch/$package/"*.deb Version)
			dpkg-deb --fsys-tarfile "$scratch/$package/"*.deb |
				tar -xO "./usr/share/doc/$package/copyright" >"$scratch/copyright" 2>/dev/null ||
				[[ $licence != - ]] || die "$package has no copyright file of its own: say its licence in debian-packages"
		fi
		[[ $licence != - ]] || licence=$(spdx_of_debian "$scratch/copyright")
		[[ -n $licence ]] || die "$package: its copyright file names no licence for \`Files: *\`; say it in debian-packages"
		jq -n --arg name "$package" --arg version "$at" --arg licence "$licence" \
			--arg suite "$suite" --arg use "$use" \
			'{name: $name, version: $version, licence: $licence, suite: $suite, use: $use}'
	done | jq -s .
	rm -rf "$scratch"
}

# debian_fetch PACKAGE SUITE OWN-SUITE: downloads the package, installing
# nothing. A suite that this machine does not use gets package lists of its
# own, from the archive that this machine uses.
debian_fetch() {
	local -a options=(-qq -o 'APT::Sandbox::User=root')
	mkdir -p "$scratch/$1"
	if [[ $2 != "$3" ]]; then
		options+=(-o "Dir::Etc::sourcelist=$scratch/$2.sources" -o Dir::Etc::sourceparts=-
			-o "Dir::State::lists=$scratch/$2.lists" -o Dir::Cache::pkgcache= -o Dir::Cache::srcpkgcache=)
		if [[ ! -d $scratch/$2.lists ]]; then
			mkdir -p "$scratch/$2.lists/partial"
			sed -E "s/^Suites: $3( .*)?\$/Suites: $2/; s/^Suites: $3-security/Suites: $2-security/" \
				/etc/apt/sources.list.d/debian.sources >"$scratch/$2.sources"
			apt-get "${options[@]}" update >&2
		fi
	fi
	(cd "$scratch/$1" && apt-get "${options[@]}" download "$1" >&2)
}

# spdx_of_debian FILE: the licence of `Files: *` in a machine-readable copyright
# file (DEP-5), in SPDX's words.
spdx_of_debian() {
	awk '
		/^$/ { all = 0 }
		/^Files:/ { all = ($2 == "*") }
		all && /^License:/ { sub(/^License:[ \t]*/, ""); print; exit }' "$1" |
		sed -E '
			s/ or / OR /g; s/ and / AND /g
			s/\b(L?GPL|AGPL)-([0-9])\b([^.]|$)/\1-\2.0\3/g
			s/\b(A?L?GPL-[0-9.]+)\+/\1-or-later/g
			s/\b(A?L?GPL-[0-9.]+)( |$)/\1-only\2/g
			s/\bBSD-([23])-clause\b/BSD-\1-Clause/g
			s/\bExpat\b/MIT/g'
}

# manifest_markdown: the JSON on standard input, for people.
manifest_markdown() {
	jq -r '
		"# Components",
		"",
		"Generated by `build --manifest` from the `go.mod` files and `debian-packages`; `build --check-manifest` holds it to them.",
		"The same, for machines: `components.json`.",
		"",
		"## Built here from Go modules",
		"",
		"| Component | Version | Licence | Binaries | Module | Checksum (go.sum) |",
		"|---|---|---|---|---|---|",
		(.components[] | .name as $name | .modules[] |
			"| \($name) | \(.version) | \(.licence) | \(.binaries | join(", ")) | `\(.path)` | `\(.sum)` |"),
		"",
		"### Licences of the modules linked in",
		"",
		"| Component | Modules | Of which |",
		"|---|---|---|",
		(.components[] | "| \(.name) | \(.linked | add) | \(.linked | to_entries | sort_by(-.value) | map("\(.key): \(.value)") | join(", ")) |"),
		"",
		"## From Debian",
		"",
		"Version as of the last `build --manifest`; a licence is that of the package as a whole.",
		"",
		"| Package | Version | Suite | Licence | Use |",
		"|---|---|---|---|---|",
		(.packages[] | "| \(.name) | \(.version) | \(.suite) | \(.licence) | \(.use) |")
	'
}
