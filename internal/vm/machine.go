package vm

import (
	"fmt"
	"slices"
	"strings"
)

// A Machine is a kind of guest: an architecture with one size of pages, and
// what QEMU, the kernel and Debian call it.
type Machine struct {
	Arch     string // GOARCH of the kernel
	PageSize int    // in bytes

	qemu    string // QEMU's program
	pkg     string // Debian package that has it
	fetched bool   // from a newer release than the system's: see fetchQEMU
	args    []string
	console string   // the kernel's name of the console
	append  []string // more of the kernel's command line
	cpus    int      // how many it has at most; 0 means as many as one likes

	debian  string   // Debian's name of the architecture
	flavour string   // of the kernel: the last part of its package's name
	suites  []string // where Debian keeps kernels for it
}

func (m *Machine) String() string {
	return fmt.Sprintf("%s with %d KiB pages", m.Arch, m.PageSize/1024)
}

// The suites whose kernels are of use. The lists of sid and experimental are
// long, so they are asked only for what the others do not have.
var (
	released   = []string{"bullseye", "bookworm", "bookworm-backports", "trixie", "trixie-backports"}
	unreleased = []string{"bookworm", "bookworm-backports", "sid", "experimental"}
)

// machines has the page size that comes first for each architecture as its
// default.
var machines = []Machine{
	{
		Arch: "amd64", PageSize: 4 << 10,
		qemu: "qemu-system-x86_64", pkg: "qemu-system-x86",
		args:    []string{"-machine", "q35"},
		console: "ttyS0,115200",
		append:  []string{"reboot=t", "tsc=reliable", "no_timer_check"},
		debian:  "amd64", flavour: "cloud-amd64", suites: released,
	},
	{
		Arch: "386", PageSize: 4 << 10,
		qemu: "qemu-system-i386", pkg: "qemu-system-x86",
		args:    []string{"-machine", "q35"},
		console: "ttyS0,115200",
		append:  []string{"reboot=t", "tsc=reliable", "no_timer_check"},
		debian:  "i386", flavour: "686-pae", suites: []string{"bullseye", "bookworm", "bookworm-backports"},
	},
	{
		Arch: "arm64", PageSize: 4 << 10,
		qemu: "qemu-system-aarch64", pkg: "qemu-system-arm",
		args:    []string{"-machine", "virt", "-cpu", "max,pauth-impdef=on"},
		console: "ttyAMA0",
		debian:  "arm64", flavour: "arm64", suites: released,
	},
	{
		Arch: "arm64", PageSize: 16 << 10,
		qemu: "qemu-system-aarch64", pkg: "qemu-system-arm",
		args:    []string{"-machine", "virt", "-cpu", "max,pauth-impdef=on"},
		console: "ttyAMA0",
		debian:  "arm64", flavour: "arm64-16k", suites: released,
	},
	{
		Arch: "arm", PageSize: 4 << 10,
		qemu: "qemu-system-arm", pkg: "qemu-system-arm",
		args:    []string{"-machine", "virt", "-cpu", "cortex-a15"},
		console: "ttyAMA0",
		debian:  "armhf", flavour: "armmp-lpae", suites: append([]string{"bullseye"}, unreleased...),
	},
	{
		Arch: "riscv64", PageSize: 4 << 10,
		qemu: "qemu-system-riscv64", pkg: "qemu-system-riscv", fetched: true,
		args:    []string{"-machine", "virt", "-cpu", "max"}, // write protection needs an extension
		console: "ttyS0",
		debian:  "riscv64", flavour: "riscv64", suites: unreleased,
	},
	{
		Arch: "ppc64le", PageSize: 4 << 10,
		qemu: "qemu-system-ppc64", pkg: "qemu-system-ppc",
		args:    []string{"-machine", "pseries,x-vof=on"},
		console: "hvc0",
		debian:  "ppc64el", flavour: "powerpc64le", suites: unreleased,
	},
	{
		Arch: "ppc64le", PageSize: 64 << 10,
		qemu: "qemu-system-ppc64", pkg: "qemu-system-ppc",
		args:    []string{"-machine", "pseries,x-vof=on"},
		console: "hvc0",
		debian:  "ppc64el", flavour: "powerpc64le-64k", suites: unreleased,
	},
	{
		Arch: "s390x", PageSize: 4 << 10,
		qemu: "qemu-system-s390x", pkg: "qemu-system-s390x",
		args:    []string{"-machine", "s390-ccw-virtio"},
		console: "ttysclp0",
		debian:  "s390x", flavour: "s390x", suites: unreleased,
	},
	{
		Arch: "mips64le", PageSize: 4 << 10,
		qemu: "qemu-system-mips64el", pkg: "qemu-system-mips",
		args:    []string{"-machine", "malta", "-cpu", "5KEc"},
		console: "ttyS0,115200",
		append:  []string{"nokaslr"}, // a kernel that has moved itself oopses where it should answer EFAULT
		debian:  "mips64el", flavour: "5kc-malta", suites: unreleased,
		cpus: 1,
	},
	{
		Arch: "loong64", PageSize: 16 << 10,
		qemu: "qemu-system-loongarch64", pkg: "qemu-system-misc", fetched: true,
		args:    []string{"-machine", "virt", "-cpu", "la464"},
		console: "ttyS0,115200",
		append:  []string{"initcall_blacklist=i8042_init"},
		debian:  "loong64", flavour: "loong64", suites: unreleased,
	},
}

// FindMachine returns the machine with this architecture, in Go's words, and
// page size in bytes; 0 is the architecture's usual one.
func FindMachine(arch string, pageSize int) (*Machine, error) {
	var have []string
	for i := range machines {
		m := &machines[i]
		if m.Arch == arch && (pageSize == 0 || pageSize == m.PageSize) {
			return m, nil
		}
		if m.Arch == arch {
			have = append(have, m.String())
		} else if pageSize == 0 && !slices.Contains(have, m.Arch) {
			have = append(have, m.Arch)
		}
	}
	if pageSize == 0 {
		return nil, fmt.Errorf("no machine of architecture %q: there are %s", arch, strings.Join(have, ", "))
	}
	return nil, fmt.Errorf("no machine of architecture %q with pages of %d bytes: there are %s", arch, pageSize, strings.Join(have, ", "))
}

// commandLine is the kernel's command line. Messages of the kernel stay off
// the console, but for its last words.
func (m *Machine) commandLine() string {
	words := append([]string{"console=" + m.console, "quiet", "loglevel=1", "panic=-1", "rdinit=/init"}, m.append...)
	return strings.Join(words, " ")
}
