package vm

import (
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
)

func TestFindMachine(t *testing.T) {
	for _, test := range []struct {
		arch     string
		pageSize int
		want     string
	}{
		{"amd64", 0, "cloud-amd64"},
		{"386", 0, "686-pae"},
		{"arm64", 0, "arm64"},
		{"arm64", 4 << 10, "arm64"},
		{"arm64", 16 << 10, "arm64-16k"},
		{"ppc64le", 64 << 10, "powerpc64le-64k"},
		{"loong64", 0, "loong64"},
	} {
		m, err := FindMachine(test.arch, test.pageSize)
		if err != nil {
			t.Errorf("%s, %d: %v", test.arch, test.pageSize, err)
		} else if m.flavour != test.want {
			t.Errorf("%s, %d: kernel %s, want %s", test.arch, test.pageSize, m.flavour, test.want)
		}
	}
	for _, test := range []struct {
		arch     string
		pageSize int
		says     string
	}{
		{"sparc64", 0, "s390x"},
		{"arm64", 64 << 10, "arm64 with 16 KiB pages"},
	} {
		m, err := FindMachine(test.arch, test.pageSize)
		if err == nil || !strings.Contains(err.Error(), test.says) {
			t.Errorf("%s, %d: %v, %v, want an error that names %s", test.arch, test.pageSize, m, err, test.says)
		}
	}
}

func TestArguments(t *testing.T) {
	for _, test := range []struct {
		arch string
		want []string
	}{
		{"amd64", []string{"-machine q35", "-serial chardev:console", "-m 1024", "-smp 2", "-no-reboot",
			"console=ttyS0,115200 quiet", "rdinit=/init", "tsc=reliable", "panic=-1", "no_timer_check quirk=1"}},
		{"s390x", []string{"-device sclpconsole,chardev=console", "console=ttysclp0"}},
		{"mips64le", []string{"-smp 1"}},
	} {
		m, err := FindMachine(test.arch, 0)
		if err != nil {
			t.Fatal(err)
		}
		args := m.arguments(&Config{Machine: m, Kernel: "kernel", Append: "quirk=1", QEMUArgs: []string{"-x", "y"}}, "initrd")
		line := strings.Join(args, " ")
		for _, want := range append(test.want, "-kernel kernel -initrd initrd -append", "-x y") {
			if !strings.Contains(line, want) {
				t.Errorf("%s: %q lacks %q", test.arch, line, want)
			}
		}
		if test.arch == "s390x" && slices.Contains(args, "-serial") {
			t.Errorf("s390x has no serial line: %q", line)
		}
	}
}

func TestMissingQEMU(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	t.Setenv("UFFD_VM_CACHE", t.TempDir())
	for arch, says := range map[string]string{
		"s390x":   "apt-get install --no-install-recommends qemu-system-s390x",
		"loong64": "vmrun -install -arch loong64",
	} {
		m, err := FindMachine(arch, 0)
		if err != nil {
			t.Fatal(err)
		}
		_, err = m.QEMU()
		if _, ok := errors.AsType[*MissingError](err); !ok || !strings.Contains(err.Error(), says) {
			t.Errorf("%s: %v, want a MissingError that says %q", arch, err, says)
		}
	}
}

func TestLibraries(t *testing.T) {
	got := libraries(`Pre-Depends: libc6 (>= 2.34)
Depends: libaio1t64 (>= 0.3.93) | libaio1, perl:any, libudev1:any (>= 183), zlib1g, qemu-system-common (= 1), qemu-system-data (>> 1), opensbi
`)
	want := []string{"libc6", "libaio1t64", "libudev1", "zlib1g", "qemu-system-data", "opensbi"}
	if !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
	if got := libraries(""); len(got) > 0 {
		t.Errorf("of nothing: %q", got)
	}
}

func TestHasVirtualisation(t *testing.T) {
	for text, want := range map[string]bool{
		"processor\t: 0\nflags\t\t: fpu vmx sse\n": true,
		"flags\t\t: fpu svm\n":                     true,
		"flags\t\t: fpu sse\nvmx flags\t: vnmi\n":  false,
		"bugs\t\t: vmx svm\n":                      false,
		"":                                         false,
	} {
		name := filepath.Join(t.TempDir(), "cpuinfo")
		if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if got := hasVirtualisation(name); got != want {
			t.Errorf("%q: %v", text, got)
		}
	}
	if hasVirtualisation(filepath.Join(t.TempDir(), "none")) {
		t.Error("true without a file")
	}
}

// KVM takes the processor's flags, the device, and a kernel for this processor.
func TestAccelerator(t *testing.T) {
	dir := t.TempDir()
	file := func(name, text string) string {
		name = filepath.Join(dir, name)
		if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return name
	}
	flags, noFlags := file("flags", "flags\t\t: fpu svm\n"), file("no-flags", "flags\t\t: fpu\n")
	kvm, noKVM := file("kvm", ""), filepath.Join(dir, "none")
	other := "s390x"
	if runtime.GOARCH == other {
		other = "amd64"
	}
	for _, test := range []struct{ arch, cpuinfo, kvm, want string }{
		{runtime.GOARCH, flags, kvm, "kvm"},
		{runtime.GOARCH, noFlags, kvm, "tcg"}, // starts, and cannot run a kernel
		{runtime.GOARCH, flags, noKVM, "tcg"},
		{other, flags, kvm, "tcg"},
	} {
		if got := accelerator(test.arch, test.cpuinfo, test.kvm); !slices.Equal(got, []string{"-accel", test.want}) {
			t.Errorf("%+v: %q", test, got)
		}
	}
}
