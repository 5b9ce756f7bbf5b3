package debian

import (
	"cmp"
	"strings"
)

// CompareVersions orders version numbers of Debian packages as dpkg does.
func CompareVersions(a, b string) int {
	epochA, upstreamA, revisionA := splitVersion(a)
	epochB, upstreamB, revisionB := splitVersion(b)
	return cmp.Or(
		comparePart(epochA, epochB),
		comparePart(upstreamA, upstreamB),
		comparePart(revisionA, revisionB),
	)
}

// splitVersion takes [epoch:]upstream[-revision] apart.
func splitVersion(v string) (epoch, upstream, revision string) {
	if i := strings.IndexByte(v, ':'); i >= 0 {
		epoch, v = v[:i], v[i+1:]
	}
	if i := strings.LastIndexByte(v, '-'); i >= 0 {
		v, revision = v[:i], v[i+1:]
	}
	return epoch, v, revision
}

// comparePart compares runs of other characters and runs of digits in turn.
func comparePart(a, b string) int {
	for a != "" || b != "" {
		for !startsWithDigit(a) || !startsWithDigit(b) {
			orderA, orderB := order(a), order(b)
			if orderA != orderB {
				return cmp.Compare(orderA, orderB)
			}
			if orderA == 0 {
				break
			}
			a, b = a[1:], b[1:]
		}
		var numberA, numberB string
		numberA, a = cutNumber(a)
		numberB, b = cutNumber(b)
		// Without leading zeros, the longer number is the larger one.
		if c := cmp.Or(cmp.Compare(len(numberA), len(numberB)), strings.Compare(numberA, numberB)); c != 0 {
			return c
		}
	}
	return 0
}

// order ranks the first character of the rest of a version: a tilde before
// the end, the end (or a number) before letters, letters before the others.
func order(rest string) int {
	switch {
	case rest == "" || startsWithDigit(rest):
		return 0
	case rest[0] == '~':
		return -1
	case 'A' <= rest[0] && rest[0] <= 'Z', 'a' <= rest[0] && rest[0] <= 'z':
		return int(rest[0])
	default:
		return int(rest[0]) + 256
	}
}

func startsWithDigit(s string) bool {
	return s != "" && '0' <= s[0] && s[0] <= '9'
}

// cutNumber splits off the digits that s begins with, less leading zeros.
func cutNumber(s string) (number, rest string) {
	n := 0
	for startsWithDigit(s[n:]) {
		n++
	}
	return strings.TrimLeft(s[:n], "0"), s[n:]
}
