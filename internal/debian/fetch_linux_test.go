package debian

import (
	"context"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

// fakeApt puts an apt-get first in the path that fails for what its state's file
// "gone" names, and notes each call, with the state's folder, in the file it
// returns.
func fakeApt(t *testing.T) (calls string) {
	t.Helper()
	dir := t.TempDir()
	calls = filepath.Join(dir, "calls")
	script := `#!/bin/sh
[ "$1 $2" = "-q -c" ] || exit 9
state=${3%/apt.conf}
echo "$state $4 $5" >>` + calls + `
case $4 in
update)
	mkdir -p "$state/lists"
	printf 'Package: linux-image-6.1\nVersion: 6.1-1\nArchitecture: amd64\n' >"$state/lists/x_Packages"
	exit 100 ;; # after it did what matters
download)
	case $5 in *=6.1-3) echo 404 Not Found; exit 100 ;; esac
	echo "$5" >"${5%=*}_any_amd64.deb" ;;
esac
`
	if err := os.WriteFile(filepath.Join(dir, "apt-get"), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	return calls
}

func lines(t *testing.T, name string) []string {
	t.Helper()
	text, err := os.ReadFile(name)
	if err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	return strings.Split(strings.TrimSuffix(string(text), "\n"), "\n")
}

// TestDownloadFirst walks down to a package that can be had, in a state of its
// own, and asks for it once.
func TestDownloadFirst(t *testing.T) {
	calls := fakeApt(t)
	a := &Archive{dir: t.TempDir()}
	if err := os.MkdirAll(filepath.Join(a.dir, "debs"), 0o755); err != nil {
		t.Fatal(err)
	}
	state := filepath.Join(a.dir, "apt", "bookworm_amd64")
	index := filepath.Join(state, indexName)
	if err := os.MkdirAll(state, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(index, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	var packages []Package
	for _, version := range []string{"6.1-3", "6.1-2", "6.1-1"} {
		packages = append(packages, Package{Name: "linux", Version: version, Arch: "amd64", Suite: "bookworm", listArch: "amd64"})
	}
	for range 2 { // the second time from the cache
		p, deb, err := a.DownloadFirst(context.Background(), packages)
		if err != nil || p.Version != "6.1-2" || lines(t, deb)[0] != "linux=6.1-2" {
			t.Fatalf("got %v, %s, %v; want 6.1-2", p, deb, err)
		}
	}
	want := []string{
		state + " download linux=6.1-3",
		state + " download linux=6.1-2",
		state + " download linux=6.1-3", // it may be there again
	}
	if got := lines(t, calls); !slices.Equal(got, want) {
		t.Errorf("calls %q, want %q", got, want)
	}
	if _, err := os.Stat(index); err == nil {
		t.Error("lists that name what is gone are kept")
	}
	if _, _, err := a.DownloadFirst(context.Background(), packages[:1]); err == nil || !strings.Contains(err.Error(), "404 Not Found") {
		t.Errorf("nothing to be had: %v", err)
	}
}

// TestFind reads lists in a state of its own, though apt-get says it failed, and
// again only when they are old.
func TestFind(t *testing.T) {
	if _, err := os.Stat("/usr/lib/apt/apt-helper"); err != nil {
		if _, err := Open(t.TempDir()); err == nil {
			t.Error("Open works where lists cannot be read")
		}
		return
	}
	calls := fakeApt(t)
	a := &Archive{dir: t.TempDir(), uris: []string{archiveURI}}
	find := func() {
		t.Helper()
		found, err := a.Find(context.Background(), []string{"bookworm"}, "amd64", regexp.MustCompile("^linux"))
		want := []Package{{Name: "linux-image-6.1", Version: "6.1-1", Arch: "amd64", Suite: "bookworm", listArch: "amd64"}}
		if err != nil || !slices.Equal(found, want) {
			t.Fatalf("found %v, %v; want %v", found, err, want)
		}
	}
	find()
	find()
	state := filepath.Join(a.dir, "apt", "bookworm_amd64")
	call := state + " update "
	if got := lines(t, calls); !slices.Equal(got, []string{call}) {
		t.Errorf("calls %q, want one update", got)
	}
	old := time.Now().Add(-2 * listsAge)
	if err := os.Chtimes(filepath.Join(state, indexName), old, old); err != nil {
		t.Fatal(err)
	}
	find()
	if got := lines(t, calls); !slices.Equal(got, []string{call, call}) {
		t.Errorf("calls %q, want another update", got)
	}
	conf := strings.Join(lines(t, filepath.Join(state, "apt.conf")), "\n")
	for _, setting := range regexp.MustCompile(`(?m)^Dir::.*$`).FindAllString(conf, -1) {
		if !strings.Contains(setting, `"`+state) && !strings.Contains(setting, `"/dev/null"`) && !strings.Contains(setting, `""`) {
			t.Errorf("the system's own: %s", setting)
		}
	}
}
