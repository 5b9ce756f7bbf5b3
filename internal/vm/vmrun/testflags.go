package main

import (
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/go-uffd/uffd/internal/vm/job"
)

// The flags of a test binary that name files to write, and folders to write
// files into.
var (
	fileFlags = []string{
		"test.coverprofile", "test.cpuprofile", "test.memprofile", "test.blockprofile",
		"test.mutexprofile", "test.trace",
	}
	folderFlags = []string{"test.gocoverdir", "test.outputdir"}
)

// In the guest, all of them are in this folder, with the flag as their name.
const outputDir = "/out"

// outputs maps files and folders in the guest to those on the host that they
// are to become.
type outputs map[string]string

// guestArgs turns the arguments of a test binary into those for the guest,
// where it writes to files of other names.
func guestArgs(args []string, cwd string) ([]string, outputs) {
	relativeTo := cwd
	for _, arg := range args {
		if name, value, ok := testFlag(arg); ok && name == "test.outputdir" {
			relativeTo = value
		}
	}
	files := make(outputs)
	var guest []string
	for _, arg := range args {
		name, value, ok := testFlag(arg)
		switch {
		case !ok:
			guest = append(guest, arg)
		case name == "test.testlogfile":
			// Without it, go test does not cache the result, which it should
			// not: it does not see what the guest depends on.
		case slices.Contains(fileFlags, name) || slices.Contains(folderFlags, name):
			if !filepath.IsAbs(value) && slices.Contains(fileFlags, name) {
				value = filepath.Join(relativeTo, value)
			}
			file := path.Join(outputDir, name)
			files[file] = value
			guest = append(guest, "-"+name+"="+file)
		default:
			guest = append(guest, arg)
		}
	}
	return guest, files
}

// testFlag takes a flag of the form -test.name=value apart, as go test passes
// them.
func testFlag(arg string) (name, value string, ok bool) {
	arg, ok = strings.CutPrefix(arg, "-")
	if !ok {
		return "", "", false
	}
	name, value, ok = strings.Cut(strings.TrimPrefix(arg, "-"), "=")
	return name, value, ok && strings.HasPrefix(name, "test.")
}

// limitFor leaves a test binary the time to end by itself at its own limit,
// with the stacks of its goroutines.
func limitFor(args []string) time.Duration {
	for _, arg := range args {
		name, value, ok := testFlag(arg)
		if d, err := time.ParseDuration(value); ok && name == "test.timeout" && err == nil && d > 0 {
			return d + 15*time.Second
		}
	}
	return 10 * time.Minute
}

func (o outputs) guestPaths() []string {
	var paths []string
	for guest := range o {
		paths = append(paths, guest)
	}
	slices.Sort(paths)
	return paths
}

// save writes a file from the guest to where it belongs on the host.
func (o outputs) save(f *job.File) error {
	for guest, host := range o {
		rel, ok := strings.CutPrefix(f.Path, guest)
		if !ok || rel != "" && rel[0] != '/' {
			continue
		}
		rel = strings.TrimPrefix(rel, "/")
		if rel != "" && !filepath.IsLocal(rel) {
			break
		}
		name := filepath.Join(host, filepath.FromSlash(rel))
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			return err
		}
		return os.WriteFile(name, f.Data, 0o644)
	}
	return fmt.Errorf("the guest sent the file %s, which was not asked for", strconv.Quote(f.Path))
}
