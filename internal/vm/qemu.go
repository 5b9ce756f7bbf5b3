package vm

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strconv"
	"strings"
)

// MissingError says that QEMU is not there.
type MissingError struct {
	Program string
	Remedy  string // a command
}

func (e *MissingError) Error() string {
	return fmt.Sprintf("%s is missing: run %q", e.Program, e.Remedy)
}

// QEMU returns the beginning of the command line that runs the machine's
// emulator, or a [MissingError].
func (m *Machine) QEMU() ([]string, error) {
	if !m.fetched {
		path, err := exec.LookPath(m.qemu)
		if err != nil {
			return nil, &MissingError{m.qemu, "apt-get install --no-install-recommends " + m.pkg}
		}
		return []string{path}, nil
	}
	dir, err := m.fetchedDir()
	if err != nil {
		return nil, err
	}
	if _, err := os.Stat(dir); err != nil {
		return nil, &MissingError{"a new " + m.qemu, "go run ./internal/vm/vmrun -install -arch " + m.Arch}
	}
	return fetchedCommand(dir, m.qemu)
}

// InstallQEMU sees to it that the machine's emulator is there, with the
// system's apt-get or in the cache directory.
func (m *Machine) InstallQEMU(ctx context.Context) error {
	if _, err := m.QEMU(); err == nil {
		return nil
	}
	if m.fetched {
		dir, err := m.fetchedDir()
		if err != nil {
			return err
		}
		return fetchQEMU(ctx, m.pkg, dir)
	}
	for _, args := range [][]string{
		{"update"},
		{"install", "-y", "--no-install-recommends", m.pkg},
	} {
		cmd := exec.CommandContext(ctx, "apt-get", append([]string{"-q"}, args...)...)
		cmd.Env = append(os.Environ(), "DEBIAN_FRONTEND=noninteractive")
		cmd.Stdout, cmd.Stderr = os.Stderr, os.Stderr
		// An update that failed in part may have done what is needed.
		if err := cmd.Run(); err != nil && args[0] == "install" {
			return fmt.Errorf("%v: %w", cmd.Args, err)
		}
	}
	_, err := m.QEMU()
	return err
}

// arguments returns QEMU's arguments. What the guest writes to its console
// comes out of QEMU's standard output.
func (m *Machine) arguments(c *Config, initrd string) []string {
	args := slices.Concat(m.args, accelerator(m.Arch, "/proc/cpuinfo", "/dev/kvm"), []string{
		"-m", strconv.Itoa(c.memory()),
		"-smp", strconv.Itoa(c.cpus()),
		"-nodefaults", "-no-user-config", "-no-reboot", "-display", "none",
		"-chardev", "stdio,id=console,signal=off",
	})
	if m.Arch == "s390x" {
		args = append(args, "-device", "sclpconsole,chardev=console")
	} else {
		args = append(args, "-serial", "chardev:console")
	}
	append := strings.TrimSpace(m.commandLine() + " " + c.Append)
	return slices.Concat(args, []string{"-kernel", c.Kernel, "-initrd", initrd, "-append", append}, c.QEMUArgs)
}

// accelerator chooses between the processor and emulation of it. That
// /dev/kvm exists is not enough: there are hosts, themselves guests, whose KVM
// starts and then cannot run an ordinary kernel. Such processors lack the
// flags of hardware virtualisation.
func accelerator(arch, cpuinfo, kvm string) []string {
	native := runtime.GOARCH == arch || runtime.GOARCH == "amd64" && arch == "386"
	if native && hasVirtualisation(cpuinfo) {
		if f, err := os.OpenFile(kvm, os.O_RDWR, 0); err == nil {
			f.Close()
			return []string{"-accel", "kvm"}
		}
	}
	return []string{"-accel", "tcg"}
}

func hasVirtualisation(cpuinfo string) bool {
	f, err := os.Open(cpuinfo)
	if err != nil {
		return false
	}
	defer f.Close()
	lines := bufio.NewScanner(f)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		name, value, _ := strings.Cut(lines.Text(), ":")
		if strings.TrimSpace(name) != "flags" {
			continue
		}
		flags := strings.Fields(value)
		return slices.Contains(flags, "vmx") || slices.Contains(flags, "svm")
	}
	return false
}
