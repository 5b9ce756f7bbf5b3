package main

import (
	"maps"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/go-uffd/uffd/internal/vm/job"
)

func TestGuestArgs(t *testing.T) {
	for _, test := range []struct {
		name  string
		args  []string
		guest []string
		files outputs
	}{
		{
			name:  "go test",
			args:  []string{"-test.testlogfile=/b/log", "-test.paniconexit0", "-test.timeout=10m0s", "-test.v=true"},
			guest: []string{"-test.paniconexit0", "-test.timeout=10m0s", "-test.v=true"},
			files: outputs{},
		},
		{
			name:  "coverage",
			args:  []string{"-test.coverprofile=/b/c.out", "-test.gocoverdir=/b/cov", "-test.outputdir=/w"},
			guest: []string{"-test.coverprofile=/out/test.coverprofile", "-test.gocoverdir=/out/test.gocoverdir", "-test.outputdir=/out/test.outputdir"},
			files: outputs{"/out/test.coverprofile": "/b/c.out", "/out/test.gocoverdir": "/b/cov", "/out/test.outputdir": "/w"},
		},
		{
			name:  "relative",
			args:  []string{"--test.cpuprofile=cpu", "-test.outputdir=/w", "file", "-x=test.trace=1"},
			guest: []string{"-test.cpuprofile=/out/test.cpuprofile", "-test.outputdir=/out/test.outputdir", "file", "-x=test.trace=1"},
			files: outputs{"/out/test.cpuprofile": "/w/cpu", "/out/test.outputdir": "/w"},
		},
		{
			name:  "relative to the working directory",
			args:  []string{"-test.trace=t"},
			guest: []string{"-test.trace=/out/test.trace"},
			files: outputs{"/out/test.trace": "/cwd/t"},
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			guest, files := guestArgs(test.args, "/cwd")
			if !slices.Equal(guest, test.guest) {
				t.Errorf("arguments %q, want %q", guest, test.guest)
			}
			if !maps.Equal(files, test.files) {
				t.Errorf("files %q, want %q", files, test.files)
			}
		})
	}
}

func TestLimitFor(t *testing.T) {
	for _, test := range []struct {
		args []string
		want time.Duration
	}{
		{nil, 10 * time.Minute},
		{[]string{"-test.timeout=2m0s"}, 2*time.Minute + 15*time.Second},
		{[]string{"-test.timeout=0s"}, 10 * time.Minute},
		{[]string{"-test.timeout=x"}, 10 * time.Minute},
	} {
		if got := limitFor(test.args); got != test.want {
			t.Errorf("%q: %v, want %v", test.args, got, test.want)
		}
	}
}

func TestSave(t *testing.T) {
	dir := t.TempDir()
	o := outputs{"/out/test.coverprofile": filepath.Join(dir, "c.out"), "/out/test.outputdir": filepath.Join(dir, "d")}
	for path, want := range map[string]string{
		"/out/test.coverprofile":  "c.out",
		"/out/test.outputdir/a/b": "d/a/b",
	} {
		if err := o.save(&job.File{Path: path, Data: []byte(path)}); err != nil {
			t.Errorf("%s: %v", path, err)
			continue
		}
		data, err := os.ReadFile(filepath.Join(dir, filepath.FromSlash(want)))
		if err != nil || string(data) != path {
			t.Errorf("%s: %q, %v", path, data, err)
		}
	}
	for _, path := range []string{"/out/test.outputdir/../../x", "/out/directory", "/etc/passwd", ""} {
		if err := o.save(&job.File{Path: path}); err == nil {
			t.Errorf("%q was written", path)
		}
	}
}
