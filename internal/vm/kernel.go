package vm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/go-uffd/uffd/internal/debian"
)

// CacheDir is where packages and kernels are kept: $UFFD_VM_CACHE, or uffd/vm
// in the user's cache directory.
func CacheDir() (string, error) {
	if dir := os.Getenv("UFFD_VM_CACHE"); dir != "" {
		return filepath.Abs(dir)
	}
	dir, err := os.UserCacheDir()
	if err != nil {
		return "", err
	}
	return filepath.Join(dir, "uffd", "vm"), nil
}

// FetchKernel returns the image of the newest of Debian's kernels for the
// machine whose version begins with the parts in pattern: "6.1" stands for
// 6.1.0-50 and not for 6.12. An empty pattern stands for all.
func FetchKernel(ctx context.Context, m *Machine, pattern string) (image string, err error) {
	cache, err := CacheDir()
	if err != nil {
		return "", err
	}
	archive, err := debian.Open(filepath.Join(cache, "debian"))
	if err != nil {
		return "", err
	}
	found, err := archive.Find(ctx, m.suites, m.debian, m.kernelPackages())
	if len(found) == 0 {
		return "", err // else some suite could not be had, but others were
	}
	kernels := selectKernels(m, found, pattern)
	if len(kernels) == 0 {
		return "", errors.Join(fmt.Errorf("no kernel %q for %v: there are %s", pattern, m, strings.Join(releases(m, found), ", ")), err)
	}
	p, deb, err := archive.DownloadFirst(ctx, kernels)
	if err != nil {
		return "", err
	}
	dir := filepath.Join(cache, "kernels", p.Name+"_"+p.Version+"_"+p.Arch)
	if image, err := findImage(dir); err == nil {
		return image, nil
	}
	// Unpacked elsewhere first, so that what has the final name is complete.
	tmp, err := os.MkdirTemp(cache, "unpack")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(tmp)
	if err := debian.Extract(ctx, deb, tmp, "*/vmlinu[xz]*"); err != nil {
		return "", err
	}
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		return "", err
	}
	renameErr := os.Rename(tmp, dir)
	if image, err := findImage(dir); err == nil {
		return image, nil // also if another process was faster
	}
	return "", errors.Join(fmt.Errorf("%v has no kernel image", p), renameErr)
}

// kernelPackages matches the names of the packages that have kernels for the
// machine, as linux-image-6.12.48+deb13-cloud-amd64. Variants such as "rt" and
// release candidates are no part of it.
func (m *Machine) kernelPackages() *regexp.Regexp {
	return regexp.MustCompile(`^linux-(image|binary)-([0-9][^-]*(?:-[0-9][^-]*)?)-` + regexp.QuoteMeta(m.flavour) + `$`)
}

// release is the kernel's version in the name of its package.
func release(m *Machine, p debian.Package) string {
	return m.kernelPackages().FindStringSubmatch(p.Name)[2]
}

// selectKernels returns those packages that match pattern, in their order.
// Where the image is in a package of its own, linux-binary, that is it.
func selectKernels(m *Machine, found []debian.Package, pattern string) []debian.Package {
	binary := func(p debian.Package) string { return strings.Replace(p.Name, "linux-image-", "linux-binary-", 1) }
	return slices.DeleteFunc(slices.Clone(found), func(p debian.Package) bool {
		better := p.Name != binary(p) && slices.ContainsFunc(found, func(q debian.Package) bool {
			return q.Name == binary(p) && q.Version == p.Version
		})
		return better || !matchRelease(pattern, release(m, p))
	})
}

// matchRelease reports whether a release is of the version that pattern names.
func matchRelease(pattern, release string) bool {
	rest, ok := strings.CutPrefix(release, pattern)
	return ok && (pattern == "" || rest == "" || rest[0] < '0' || rest[0] > '9')
}

// releases returns what can be asked for, for a message.
func releases(m *Machine, found []debian.Package) []string {
	var all []string
	for _, p := range found {
		if r := release(m, p); !slices.Contains(all, r) {
			all = append(all, r)
		}
	}
	return all
}

// findImage returns the kernel's image among the files of its package.
func findImage(dir string) (string, error) {
	var image string
	err := filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			image = path
		}
		return err
	})
	if err == nil && image == "" {
		err = fmt.Errorf("no kernel image in %s", dir)
	}
	return image, err
}
