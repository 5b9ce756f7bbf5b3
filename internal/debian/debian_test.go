package debian

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const (
	archiveURI = "http://debian.example.org/debian"
	stanzaFile = `# the archive
Types: deb deb-src
URIs: http://debian.example.org/debian http://second.example.org/debian
Suites: bookworm
 bookworm-updates
# a comment inside a value
 bookworm-backports
Components: main contrib
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Types: deb
URIs: http://debian.example.org/debian-security
Suites: bookworm-security
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg


types: deb
uris: http://other.example.org/debian
suites: bookworm
components: main
signed-by:
 -----BEGIN PGP PUBLIC KEY BLOCK-----
 .
 mQINBGF=
 -----END PGP PUBLIC KEY BLOCK-----

Enabled: no
Types: deb
URIs: http://off.example.org/debian
Suites: bookworm
Components: main

Types: deb-src
URIs: http://source.example.org/debian
Suites: bookworm
Components: main
`
	lineFile = `# deb http://comment.example.org/debian bookworm main
deb http://debian.example.org/debian bookworm main # the archive
deb	[ arch=amd64,arm64 signed-by=/usr/share/keyrings/debian-archive-keyring.gpg ] http://second.example.org/debian bookworm-backports contrib main
deb-src http://source.example.org/debian bookworm main
deb http://debian.example.org/debian-security bookworm-security main
deb http://old.example.org/debian-security buster/updates main
deb [signed-by=/etc/apt/keyrings/other.asc] http://other.example.org/debian bookworm main
deb http://contrib.example.org/debian bookworm contrib
deb http://flat.example.org/debian ./
deb [arch=amd64 http://broken.example.org/debian bookworm main
deb cdrom:[Debian] bookworm main
deb
`
)

func TestMachineArchives(t *testing.T) {
	both := []string{archiveURI, "http://second.example.org/debian"}
	tests := []struct {
		name  string
		files map[string]string
		want  []string // nil: an error
	}{
		{"stanzas", map[string]string{"sources.list.d/debian.sources": stanzaFile}, both},
		{"lines", map[string]string{"sources.list": lineFile}, both},
		{"lines in a part", map[string]string{"sources.list.d/debian.list": lineFile}, both},
		{"both formats name it once", map[string]string{"sources.list": lineFile, "sources.list.d/debian.sources": stanzaFile}, both},
		{"disabled file", map[string]string{"sources.list.d/debian.list.disabled": lineFile}, nil},
		{"security only", map[string]string{"sources.list": "deb http://debian.example.org/debian-security bookworm-security main\n"}, nil},
		{"none", nil, nil},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			etc := t.TempDir()
			for name, text := range test.files {
				path := filepath.Join(etc, name)
				if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			got, err := machineArchives(etc)
			if !slices.Equal(got, test.want) || (err != nil) != (test.want == nil) {
				t.Errorf("got %q, %v, want %q", got, err, test.want)
			}
		})
	}
}

func TestParseList(t *testing.T) {
	const list = `Package: linux-image-6.1.0-44-cloud-amd64
Source: linux-signed-amd64 (6.1.164+1)
Version: 6.1.164-1
Architecture: amd64
Depends: Package: nothing
Description: Linux 6.1
 Version: of the description, not the package

Package: linux-image-6.12.9-cloud-amd64
Version: 6.12.9-1
Architecture: amd64

Package: linux-libc-dev
Architecture: all
Version: 7.3.4-1~bpo13+1
`
	want := []Package{
		{Name: "linux-image-6.1.0-44-cloud-amd64", Version: "6.1.164-1", Arch: "amd64"},
		{Name: "linux-image-6.12.9-cloud-amd64", Version: "6.12.9-1", Arch: "amd64"},
		{Name: "linux-libc-dev", Version: "7.3.4-1~bpo13+1", Arch: "all"},
	}
	for _, end := range []string{"", "\n", "\n\n"} {
		text := strings.TrimRight(list, "\n") + end
		if got := parseList([]byte(text)); !slices.Equal(got, want) {
			t.Errorf("ending in %q: got %v, want %v", end, got, want)
		}
	}
	if got := parseList(nil); len(got) != 0 {
		t.Errorf("an empty list holds %v", got)
	}
}

func TestCompareVersions(t *testing.T) {
	// Each one is older than the next.
	ordered := []string{
		"0~", "0", "1~", "1~+1", "1-0~bpo1", "1", "1-0a", "1-0+b1", "1-1", "1a", "1+", "1.1", "1.a",
		"5.10.223-1", "6.1.164-1", "6.12.9-1", "6.12.10-1~bpo13+1", "6.12.10-1", "6.12.10-1+b1",
		"7.3~rc7-1~exp1", "7.3.4-1~bpo13+1", "7.3.4-1", "7.3.04-2", "7.3.4-10", "9999999999999999999998", "9999999999999999999999",
		"1:0.1-1", "1:0.1-1-1", "2:0",
	}
	for i, a := range ordered {
		for j, b := range ordered {
			want := min(max(i-j, -1), 1)
			if got := min(max(CompareVersions(a, b), -1), 1); got != want {
				t.Errorf("CompareVersions(%q, %q) = %d, want %d", a, b, got, want)
			}
		}
	}
	for _, equal := range [][2]string{{"1", "0:1"}, {"1", "1-0"}, {"1.01", "1.1"}, {"1.", "1.0"}} {
		if got := CompareVersions(equal[0], equal[1]); got != 0 {
			t.Errorf("CompareVersions(%q, %q) = %d, want 0", equal[0], equal[1], got)
		}
	}
}
