package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/go-uffd/uffd/internal/debian"
	"github.com/go-uffd/uffd/internal/uffdtest"
)

// suite has a CRIU that runs on new kernels; that of bookworm does not.
const suite = "trixie"

// program returns the command line that starts a program of a Debian package,
// which is unpacked beside the system together with the libraries that it needs.
func program(t *testing.T, pkg, path string) []string {
	t.Helper()
	if _, err := exec.LookPath("dpkg-deb"); err != nil {
		uffdtest.RequireFile(t, "/usr/bin/dpkg-deb", "")
	}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	root, err := install(ctx, pkg)
	if err != nil {
		t.Fatal(err)
	}
	loaders, _ := filepath.Glob(filepath.Join(root, "usr/lib*/ld-linux*.so.*"))
	libraries, _ := filepath.Glob(filepath.Join(root, "usr/lib/*-linux-gnu*"))
	if len(loaders) != 1 || len(libraries) == 0 {
		t.Fatalf("%s: loaders %q, libraries %q", root, loaders, libraries)
	}
	return []string{loaders[0], "--library-path", strings.Join(libraries, ":"), filepath.Join(root, path)}
}

// install returns the directory in which a package is unpacked.
func install(ctx context.Context, name string) (string, error) {
	archive, err := debian.Open("")
	if err != nil {
		return "", err
	}
	arch, err := exec.CommandContext(ctx, "dpkg", "--print-architecture").Output()
	if err != nil {
		return "", err
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		return "", err
	}
	find := func(names ...string) ([]debian.Package, error) {
		for i, name := range names {
			names[i] = regexp.QuoteMeta(name)
		}
		expr := regexp.MustCompile("^(" + strings.Join(names, "|") + ")$")
		return archive.Find(ctx, []string{suite}, strings.TrimSpace(string(arch)), expr)
	}
	packages, err := find(name)
	if err != nil {
		return "", err
	}
	// A colon, as versions have, would separate paths.
	version := strings.ReplaceAll(packages[0].Version, ":", "%3a")
	root := filepath.Join(cache, "uffd", "programs", name+"_"+version+"_"+packages[0].Arch)
	if _, err := os.Stat(root); !errors.Is(err, os.ErrNotExist) {
		return root, err
	}
	if err := os.MkdirAll(filepath.Dir(root), 0o755); err != nil {
		return "", err
	}
	tmp, err := os.MkdirTemp(filepath.Dir(root), "unpack")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(tmp)
	have := make(map[string]bool)
	for len(packages) > 0 {
		var missing []string
		for _, p := range packages {
			if have[p.Name] { // an older version
				continue
			}
			have[p.Name] = true
			deb, err := archive.Download(ctx, p)
			if err != nil {
				return "", err
			}
			if err := debian.Extract(ctx, deb, tmp, "./*"); err != nil {
				return "", err
			}
			needs, err := dependencies(ctx, deb)
			if err != nil {
				return "", err
			}
			for _, name := range needs {
				if !have[name] {
					missing = append(missing, name)
				}
			}
		}
		packages = nil
		if len(missing) > 0 {
			if packages, err = find(missing...); err != nil {
				return "", err
			}
		}
	}
	err = os.Rename(tmp, root)
	if errors.Is(err, os.ErrExist) { // another process was first
		err = nil
	}
	return root, err
}

// dependencies returns the packages that a program cannot be started without:
// libraries and parts of itself.
func dependencies(ctx context.Context, deb string) ([]string, error) {
	out, err := exec.CommandContext(ctx, "dpkg-deb", "-f", deb, "Depends").Output()
	if err != nil {
		return nil, fmt.Errorf("%s: %w", deb, err)
	}
	var names []string
	for _, dependency := range strings.Split(string(out), ",") {
		name := strings.FieldsFunc(dependency, func(r rune) bool { return strings.ContainsRune(" \n(|:", r) })
		if len(name) > 0 && (strings.HasPrefix(name[0], "lib") || name[0] == "redis-tools") {
			names = append(names, name[0])
		}
	}
	return names, nil
}
