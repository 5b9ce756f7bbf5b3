// Command vmrun runs a static program, above all a test binary, on a Linux
// kernel of choice, in a virtual machine under QEMU:
//
//	go build -o /tmp/vmrun ./internal/vm/vmrun
//	CGO_ENABLED=0 go test -exec "/tmp/vmrun -kernel 6.1" ./...
//	CGO_ENABLED=0 GOARCH=s390x go test -exec "/tmp/vmrun -kernel 6.12" ./...
//
// The kernel is the newest of Debian's that has the version asked for, fetched
// and kept in the cache directory ($UFFD_VM_CACHE, else the user's), or a file
// of one's own (-vmlinuz). The guest has the module's source tree, with the
// working directory where it is outside; the variables UFFD_*, GODEBUG,
// GOMAXPROCS and the like; /proc, /sys, /dev and an empty /tmp. Profiles that
// the test flags ask for come back.
//
// The exit status is the program's own, 128 + N if signal N ended it, or
//
//	120  the guest could not be set up or started
//	121  the kernel panicked
//	122  the kernel logged a warning, a bug or an oops
//	123  the guest ended without its end marker
//	124  the program or the guest ran into its time limit
package main

import (
	"context"
	"debug/elf"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/go-uffd/uffd/internal/vm"
	"github.com/go-uffd/uffd/internal/vm/job"
)

const (
	exitSetup    = 120
	exitPanic    = 121
	exitKernel   = 122
	exitNoMarker = 123
	exitTimeout  = 124
)

type options struct {
	kernel, vmlinuz string
	arch            string
	pageSize        int
	user            int
	limit           time.Duration
	hugePages       int
	sysctls         []job.Sysctl
	install         bool
	config          vm.Config
}

func main() {
	var o options
	flag.StringVar(&o.kernel, "kernel", "", "`version` of the kernel: 6.1 is the newest 6.1 there is (default the newest of all)")
	flag.StringVar(&o.vmlinuz, "vmlinuz", "", "kernel image to boot instead, a `file`")
	flag.StringVar(&o.arch, "arch", "", "the kernel's `GOARCH` (default the program's; amd64 for 386)")
	flag.Func("pagesize", "the kernel's page `size`: 4k, 16k or 64k (default the architecture's usual one)", func(s string) error {
		n, err := strconv.Atoi(strings.TrimSuffix(strings.ToLower(s), "k"))
		o.pageSize = n << 10
		return err
	})
	flag.IntVar(&o.user, "user", 0, "`uid` to run the program as")
	flag.DurationVar(&o.limit, "limit", 0, "time limit of the program (default a little more than its -test.timeout, or 10m)")
	flag.IntVar(&o.hugePages, "hugepages", 0, "`number` of huge pages of the default size to reserve")
	flag.Func("sysctl", "kernel parameter to set, `name=value`; may be repeated", func(s string) error {
		name, value, ok := strings.Cut(s, "=")
		if !ok {
			return errors.New("want name=value")
		}
		o.sysctls = append(o.sysctls, job.Sysctl{Name: name, Value: value})
		return nil
	})
	flag.IntVar(&o.config.Memory, "memory", 0, "memory of the guest in `MiB` (default 1024)")
	flag.IntVar(&o.config.CPUs, "cpus", 0, "`number` of processors (default 2)")
	flag.StringVar(&o.config.Append, "append", "", "`words` to add to the kernel's command line")
	flag.Func("qemu", "`arguments` to add to QEMU's", func(s string) error {
		o.config.QEMUArgs = append(o.config.QEMUArgs, strings.Fields(s)...)
		return nil
	})
	flag.BoolVar(&o.install, "install", false, "install QEMU with apt-get if it is missing; no program is needed then")
	flag.Usage = func() {
		fmt.Fprintln(os.Stderr, "usage: vmrun [flags] program [arguments]")
		flag.PrintDefaults()
	}
	flag.Parse()
	if flag.NArg() == 0 && !o.install {
		flag.Usage()
		os.Exit(exitSetup)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGQUIT)
	code, err := o.run(ctx, flag.Args())
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "vmrun:", err)
	}
	os.Exit(code)
}

// run returns the exit status and, unless it is the program's own, the reason.
func (o *options) run(ctx context.Context, command []string) (int, error) {
	if o.arch == "" && len(command) > 0 {
		arch, err := kernelArch(command[0])
		if err != nil {
			return exitSetup, err
		}
		o.arch = arch
	}
	if o.arch == "" {
		o.arch = "amd64"
	}
	machine, err := vm.FindMachine(o.arch, o.pageSize)
	if err != nil {
		return exitSetup, err
	}
	if o.install {
		if err := machine.InstallQEMU(ctx); err != nil {
			return exitSetup, err
		}
		if len(command) == 0 {
			return 0, nil
		}
	}
	if _, err := machine.QEMU(); err != nil {
		return exitSetup, err
	}
	kernel := o.vmlinuz
	if kernel == "" {
		if kernel, err = vm.FetchKernel(ctx, machine, o.kernel); err != nil {
			return exitSetup, err
		}
	}
	outputs, err := o.configure(machine, kernel, command)
	if err != nil {
		return exitSetup, err
	}
	var exit *job.Exit
	err = vm.Run(ctx, &o.config, func(e job.Event) error {
		switch {
		case e.File != nil:
			return outputs.save(e.File)
		case e.Exit != nil:
			exit = e.Exit
		}
		return nil
	})
	switch {
	case exit != nil && len(exit.KernelLog) > 0:
		err := fmt.Errorf("the kernel logged (the program's exit status was %d):\n%s", exit.Code, strings.Join(exit.KernelLog, "\n"))
		return exitKernel, err
	case exit != nil && exit.TimedOut:
		return exitTimeout, errors.Join(fmt.Errorf("the program ran into its time limit of %v", o.config.Job.Programs[0].Limit), err)
	case errors.Is(err, vm.ErrPanic):
		return exitPanic, err
	case errors.Is(err, vm.ErrTimeout):
		return exitTimeout, err
	case errors.Is(err, vm.ErrNoMarker):
		return exitNoMarker, err
	case err != nil:
		return exitSetup, err
	case exit == nil:
		return exitNoMarker, errors.New("the guest did not report the program's exit status")
	}
	return exit.Code, nil
}

// configure fills in what to boot and run.
func (o *options) configure(machine *vm.Machine, kernel string, command []string) (outputs, error) {
	const sources, binary = "/src", "/bin/program"
	cwd, err := os.Getwd()
	if err != nil {
		return nil, err
	}
	root, err := moduleRoot(cwd)
	if err != nil {
		return nil, err
	}
	files, err := vm.SourceTree(root, sources)
	if err != nil {
		return nil, err
	}
	rel, err := filepath.Rel(root, cwd)
	if err != nil {
		return nil, err
	}
	args, outputs := guestArgs(command[1:], cwd)
	if o.limit == 0 {
		o.limit = limitFor(command[1:])
	}
	o.config.Machine = machine
	o.config.Kernel = kernel
	files = append(files, vm.File{Guest: binary, Host: command[0]}, vm.File{Guest: outputDir})
	for _, flag := range folderFlags {
		files = append(files, vm.File{Guest: path.Join(outputDir, flag)})
	}
	o.config.Files = files
	o.config.Output = os.Stdout
	o.config.Job = job.Job{
		Sysctls:   o.sysctls,
		HugePages: o.hugePages,
		Programs: []job.Program{{
			Path:    binary,
			Args:    args,
			Env:     vm.GuestEnv(os.Environ()),
			Dir:     path.Join(sources, filepath.ToSlash(rel)),
			UID:     o.user,
			Limit:   o.limit,
			Outputs: outputs.guestPaths(),
		}},
	}
	return outputs, nil
}

// kernelArch returns the architecture of the kernel that the program is for.
func kernelArch(program string) (string, error) {
	f, err := elf.Open(program)
	if err != nil {
		return "", fmt.Errorf("%s: %w", program, err)
	}
	defer f.Close()
	if slices.ContainsFunc(f.Progs, func(p *elf.Prog) bool { return p.Type == elf.PT_INTERP }) {
		return "", fmt.Errorf("%s is linked dynamically, and the guest has no libraries: build it with CGO_ENABLED=0", program)
	}
	archs := map[elf.Machine]string{
		elf.EM_X86_64:    "amd64",
		elf.EM_386:       "amd64", // whose kernels run such programs too
		elf.EM_AARCH64:   "arm64",
		elf.EM_ARM:       "arm",
		elf.EM_RISCV:     "riscv64",
		elf.EM_PPC64:     "ppc64le",
		elf.EM_S390:      "s390x",
		elf.EM_MIPS:      "mips64le",
		elf.EM_LOONGARCH: "loong64",
	}
	arch, ok := archs[f.Machine]
	if !ok {
		return "", fmt.Errorf("%s: there is no guest for a program of %v", program, f.Machine)
	}
	return arch, nil
}

// moduleRoot returns the folder above dir that has the go.mod, or dir itself
// if there is none.
func moduleRoot(dir string) (string, error) {
	cmd := exec.Command("go", "env", "GOMOD")
	cmd.Dir = dir
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("go env GOMOD: %w", err)
	}
	mod := strings.TrimSpace(string(out))
	if mod == "" || mod == os.DevNull {
		return dir, nil
	}
	return filepath.Dir(mod), nil
}
