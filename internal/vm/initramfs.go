package vm

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"strings"

	"github.com/go-uffd/uffd/internal/vm/job"
)

// A File of the host that is put into the guest.
type File struct {
	Guest string // absolute path there
	Host  string // "" stands for a folder that everybody can write to
}

// SourceTree returns the files of the module at root that its tests may look
// at, to be put below dir in the guest. Large files are left out unless they
// are test data.
func SourceTree(root, dir string) ([]File, error) {
	const large = 1 << 20
	var files []File
	err := filepath.WalkDir(root, func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && name != root && strings.HasPrefix(d.Name(), ".") {
			return fs.SkipDir
		}
		if !d.Type().IsRegular() {
			return nil
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(root, name)
		if err != nil {
			return err
		}
		rel = filepath.ToSlash(rel)
		testdata := strings.Contains("/"+rel, "/testdata/")
		if info.Size() < large || testdata {
			files = append(files, File{Guest: path.Join(dir, rel), Host: name})
		}
		return nil
	})
	return files, err
}

// writeInitramfs makes the guest's root file system.
func writeInitramfs(ctx context.Context, name string, c *Config) error {
	init := filepath.Join(filepath.Dir(name), "init")
	if err := buildInit(ctx, init, c.Machine.Arch); err != nil {
		return err
	}
	description, err := json.Marshal(c.Job)
	if err != nil {
		return err
	}
	f, err := os.Create(name)
	if err != nil {
		return err
	}
	defer f.Close()
	a := newArchive(f)
	for _, dir := range []string{"proc", "sys", "dev"} {
		a.dir(dir, 0o755)
	}
	a.dir("tmp", 0o1777)
	a.char("dev/console", 0o600, 5, 1) // PID 1's standard files, before it mounts /dev
	a.file(strings.TrimPrefix(job.Path, "/"), 0o644, description)
	for _, file := range append([]File{{Guest: "/init", Host: init}}, c.Files...) {
		guest := strings.TrimPrefix(path.Clean(file.Guest), "/")
		if file.Host == "" {
			a.dir(guest, 0o1777)
			continue
		}
		data, err := os.ReadFile(file.Host)
		if err != nil {
			return err
		}
		perm := 0o644
		if info, err := os.Stat(file.Host); err == nil && info.Mode()&0o111 != 0 {
			perm = 0o755
		}
		a.file(guest, perm, data)
	}
	if err := a.close(); err != nil {
		return err
	}
	return f.Close()
}

// buildInit compiles the guest's PID 1.
func buildInit(ctx context.Context, output, arch string) error {
	const pkg = "github.com/go-uffd/uffd/internal/vm/init"
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags=-s -w", "-o", output, pkg)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH="+arch)
	if message, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%v (inside the module?): %w\n%s", cmd.Args, err, bytes.TrimSpace(message))
	}
	return nil
}

// GuestEnv returns a program's environment in the guest: of the host's
// variables those that tests and Go's runtime look at.
func GuestEnv(host []string) []string {
	env := []string{"PATH=/bin", "HOME=/tmp", "TMPDIR=/tmp"}
	for _, entry := range host {
		name, _, _ := strings.Cut(entry, "=")
		switch name {
		case "GODEBUG", "GOMAXPROCS", "GOGC", "GOMEMLIMIT", "GOTRACEBACK", "GORACE":
			env = append(env, entry)
		default:
			if strings.HasPrefix(name, "UFFD_") && name != "UFFD_VM_CACHE" {
				env = append(env, entry)
			}
		}
	}
	return env
}
