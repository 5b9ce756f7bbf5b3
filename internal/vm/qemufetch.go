package vm

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"

	"github.com/go-uffd/uffd/internal/debian"
)

// qemuSuites have the QEMU for the machines that need a newer one than
// distributions in use have. It is run from a folder of its own, with the
// libraries it was built with.
var qemuSuites = []string{"trixie-backports", "trixie"}

// fetchedDir is where a QEMU for the machine is unpacked.
func (m *Machine) fetchedDir() (string, error) {
	cache, err := CacheDir()
	return filepath.Join(cache, "qemu", m.pkg), err
}

// fetchQEMU unpacks the package of that name and all libraries it needs into
// dir.
func fetchQEMU(ctx context.Context, name, dir string) error {
	cache, err := CacheDir()
	if err != nil {
		return err
	}
	archive, err := debian.Open(filepath.Join(cache, "debian"))
	if err != nil {
		return err
	}
	arch := map[string]string{"386": "i386", "ppc64le": "ppc64el"}[runtime.GOARCH]
	if arch == "" {
		arch = runtime.GOARCH
	}
	tmp, err := os.MkdirTemp(cache, "unpack")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	for queue, i := []string{name}, 0; i < len(queue); i++ {
		found, err := archive.Find(ctx, qemuSuites, arch, regexp.MustCompile("^"+regexp.QuoteMeta(queue[i])+"$"))
		if len(found) == 0 {
			return err
		}
		_, deb, err := archive.DownloadFirst(ctx, found)
		if err != nil {
			return err
		}
		if err := debian.Extract(ctx, deb, tmp); err != nil {
			return err
		}
		depends, err := exec.CommandContext(ctx, "dpkg-deb", "--field", deb, "Depends", "Pre-Depends").Output()
		if err != nil {
			return fmt.Errorf("dpkg-deb --field %s: %w", deb, err)
		}
		for _, dependency := range libraries(string(depends)) {
			if !slices.Contains(queue, dependency) {
				queue = append(queue, dependency)
			}
		}
	}
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		return err
	}
	if err := os.Rename(tmp, dir); err != nil {
		if _, statErr := os.Stat(dir); statErr != nil {
			return err
		} // else another process was faster
	}
	return nil
}

// libraries returns those packages of a list of dependencies that a program
// needs to run from a folder of its own: libraries and QEMU's data. Of
// alternatives it takes the first.
func libraries(depends string) []string {
	var names []string
	for dependency := range strings.FieldsFuncSeq(depends, func(r rune) bool { return r == ',' || r == '\n' }) {
		words := strings.Fields(strings.TrimPrefix(strings.TrimPrefix(strings.TrimSpace(dependency), "Pre-Depends:"), "Depends:"))
		if len(words) == 0 {
			continue
		}
		name, _, _ := strings.Cut(words[0], ":") // an architecture may follow
		if strings.HasPrefix(name, "lib") || name == "zlib1g" || name == "qemu-system-data" || name == "opensbi" {
			names = append(names, name)
		}
	}
	return names
}

// fetchedCommand returns the beginning of the command line that runs the
// program in dir: its own loader, libraries and data.
func fetchedCommand(dir, program string) ([]string, error) {
	loaders, err := filepath.Glob(filepath.Join(dir, "usr/lib/*/ld-linux*.so.*"))
	if err != nil || len(loaders) != 1 {
		return nil, fmt.Errorf("%s has %d dynamic loaders instead of 1: remove it", dir, len(loaders))
	}
	return []string{
		loaders[0], "--library-path", filepath.Dir(loaders[0]),
		filepath.Join(dir, "usr/bin", program),
		"-L", filepath.Join(dir, "usr/share/qemu"),
	}, nil
}
