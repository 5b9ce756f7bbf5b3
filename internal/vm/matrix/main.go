// Command matrix runs the module's tests on the kernels and architectures of
// its table, each in a virtual machine of its own:
//
//	go run ./internal/vm/matrix -tier short
//	go run ./internal/vm/matrix -tier full -o docs/kernels.md
//
// Every guest is booted once and runs the tests of all packages. The exit
// status is 1 if anything failed, be it a test, a guest that does not boot, a
// kernel that logged a bug, or one that offers something else than the table
// says.
package main

import (
	"bytes"
	"cmp"
	"context"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/go-uffd/uffd/internal/vm"
	"github.com/go-uffd/uffd/internal/vm/job"
)

// excluded are the packages that run on the host and not in a guest.
var excluded = []string{"internal/vm", "internal/debian"}

type matrix struct {
	install bool
	verbose bool
	store   *store
	user    int
	tests   string        // which ones, as -test.run takes it
	limit   time.Duration // of each package's tests
	args    []string      // packages

	module string              // its path
	root   string              // its folder
	dir    string              // for the test binaries
	built  map[string][]binary // by GOARCH
}

// A binary is the tests of one package for one architecture.
type binary struct {
	name string // the package's path inside the module, "." for its root
	file string
}

func main() {
	var m matrix
	tier := flag.String("tier", "short", "`short` or full: which of the table's kernels")
	only := flag.String("only", "", "run only the guests whose name has all these `words`, as \"arm64 6.12 16K\"")
	out := flag.String("o", "", "Markdown `file` to write the results to")
	kept := flag.String("results", "", "`file` that keeps the results of guests where nothing failed; those are not run again")
	flag.BoolVar(&m.install, "install", false, "install with apt-get what is missing of QEMU")
	flag.BoolVar(&m.verbose, "v", false, "print all that the tests print, as it comes")
	flag.IntVar(&m.user, "user", 0, "`uid` to run the tests as")
	flag.StringVar(&m.tests, "run", "", "run only the tests that match this `regexp`")
	flag.DurationVar(&m.limit, "limit", 4*time.Minute, "time limit of each package's tests")
	flag.Usage = func() {
		fmt.Fprintln(os.Stderr, "usage: matrix [flags] [packages (default ./...)]")
		flag.PrintDefaults()
	}
	flag.Parse()
	if *tier != "short" && *tier != "full" {
		flag.Usage()
		os.Exit(2)
	}
	m.args = flag.Args()
	if len(m.args) == 0 {
		m.args = []string{"./..."}
	}
	var err error
	if m.store, err = openStore(*kept); err != nil {
		fmt.Fprintln(os.Stderr, "matrix:", err)
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	runs, err := m.run(ctx, *tier, *only)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "matrix:", err)
		os.Exit(2)
	}
	if *out != "" {
		var document bytes.Buffer
		writeDocument(&document, os.Args[1:], runs)
		if err := os.WriteFile(*out, document.Bytes(), 0o644); err != nil {
			fmt.Fprintln(os.Stderr, "matrix:", err)
			os.Exit(2)
		}
	}
	passed, failed, skipped := 0, 0, 0
	for _, r := range runs {
		passed += r.count("PASS")
		failed += r.count("FAIL")
		skipped += r.count("SKIP")
	}
	fmt.Println()
	writeTable(os.Stdout, runs)
	fmt.Printf("\nskipped:\n")
	writeSkips(os.Stdout, runs)
	fmt.Printf("\n%d passed, %d failed, %d skipped\n", passed, failed, skipped)
	if failed > 0 {
		os.Exit(1)
	}
}

func (m *matrix) run(ctx context.Context, tier, only string) ([]*run, error) {
	out, err := exec.CommandContext(ctx, "go", "list", "-m", "-f", "{{.Path}}\n{{.Dir}}").Output()
	if err != nil {
		return nil, fmt.Errorf("go list -m: %w", err)
	}
	m.module, m.root, _ = strings.Cut(strings.TrimSpace(string(out)), "\n")
	if m.dir, err = os.MkdirTemp("", "uffd-matrix-"); err != nil {
		return nil, err
	}
	defer os.RemoveAll(m.dir)
	m.built = make(map[string][]binary)

	var runs []*run
	for i := range guests {
		r := &run{guest: &guests[i]}
		if tier == "short" && !r.guest.short || !r.hasWords(only) {
			continue
		}
		if err := m.prepare(ctx, r); err != nil {
			return nil, err
		}
		runs = append(runs, r)
	}
	if len(runs) == 0 {
		return nil, fmt.Errorf("no guest of the tier %s has the words %q in its name", tier, only)
	}
	for _, r := range runs {
		key := fmt.Sprintf("%s, uid %d, -run %q, %s", r.name(), m.user, m.tests, strings.Join(m.args, " "))
		if m.store.restore(r, key) {
			continue
		}
		start := time.Now()
		if err := m.guest(ctx, r); err != nil {
			if ctx.Err() != nil {
				return nil, context.Cause(ctx)
			}
			r.fail("(guest)", err.Error())
		} else if r.count("PASS") == 0 {
			r.fail("(guest)", "no test passed")
		}
		writeFailures(os.Stdout, r)
		release := cmp.Or(r.Release, "did not boot")
		fmt.Printf("%s (%s): %d passed, %d failed, %d skipped in %v; slowest: %s\n", r.name(), release,
			r.count("PASS"), r.count("FAIL"), r.count("SKIP"), time.Since(start).Round(time.Second), r.slowest())
		if err := m.store.keep(r, key); err != nil {
			return nil, err
		}
	}
	return runs, nil
}

// prepare sees to it that there is an emulator and that the tests build.
func (m *matrix) prepare(ctx context.Context, r *run) error {
	var err error
	if r.machine, err = vm.FindMachine(r.guest.arch, r.guest.pageSize); err != nil {
		return err
	}
	if m.install {
		if err := r.machine.InstallQEMU(ctx); err != nil {
			return err
		}
	}
	if _, err := r.machine.QEMU(); err != nil {
		return fmt.Errorf("%w, or matrix -install", err)
	}
	return m.build(ctx, r.guest.programArch())
}

// guest runs all tests on one guest. An error is a failure of the guest, not
// of the tests.
func (m *matrix) guest(ctx context.Context, r *run) error {
	kernel, err := vm.FetchKernel(ctx, r.machine, r.guest.kernel)
	if err != nil {
		return err
	}
	const sources = "/src"
	files, err := vm.SourceTree(m.root, sources)
	if err != nil {
		return err
	}
	binaries := m.built[r.guest.programArch()]
	j := job.Job{HugePages: r.guest.hugePages}
	for _, b := range binaries {
		env := append([]string{fmt.Sprintf("UFFD_TEST_MASK=%#x", r.guest.mask)}, vm.GuestEnv(os.Environ())...)
		if r.guest.complete && m.user == 0 && b.name == "." {
			env = append(env, "UFFD_TEST_NO_SKIP=1")
		}
		program := path.Join("/tests", strings.ReplaceAll(b.name, "/", "-")) + ".test"
		files = append(files, vm.File{Guest: program, Host: b.file})
		j.Programs = append(j.Programs, job.Program{
			Path:  program,
			Args:  []string{"-test.short", "-test.v=test2json", "-test.paniconexit0", "-test.run=" + m.tests, "-test.timeout=" + m.limit.String()},
			Env:   env,
			Dir:   path.Join(sources, b.name),
			UID:   m.user,
			Limit: m.limit + 15*time.Second, // by then it has ended itself, with stacks
		})
	}
	console := &console{}
	if m.verbose {
		console.tee = os.Stdout
	}
	config := &vm.Config{Machine: r.machine, Kernel: kernel, Memory: r.guest.memory, Job: j, Files: files, Output: console}
	if r.guest.cpu != "" {
		config.QEMUArgs = []string{"-cpu", r.guest.cpu} // the last one counts
	}
	var current *packageRun
	err = vm.Run(ctx, config, func(e job.Event) error {
		switch {
		case e.Boot != nil:
			r.Release, r.PageSize, r.Features = e.Boot.Release, e.Boot.PageSize, e.Boot.Features
			if e.Boot.Features != r.guest.mask {
				r.fail("(mask)", fmt.Sprintf("UFFDIO_API offers %#x, the table says %#x %s", e.Boot.Features, r.guest.mask, e.Boot.UffdError))
			}
		case e.Start != nil:
			current = &packageRun{Name: binaries[e.Start.Program].name}
			r.Packages = append(r.Packages, current)
			console.to = &current.output
		case e.Exit != nil:
			current.exit(e.Exit, m.user == 0)
			console.to = nil
			if len(e.Exit.KernelLog) > 0 {
				r.fail("(kernel log)", binaries[e.Exit.Program].name+":\n"+strings.Join(e.Exit.KernelLog, "\n"))
			}
		}
		return nil
	})
	if err != nil {
		last := &console.other
		if console.to != nil {
			last = console.to
		}
		return fmt.Errorf("%w; its last words:\n%s", err, strings.Join(last.last, "\n"))
	}
	return nil
}

// build compiles the tests of all packages for an architecture, once.
func (m *matrix) build(ctx context.Context, arch string) error {
	if m.built[arch] != nil {
		return nil
	}
	fmt.Printf("building the tests for %s\n", arch)
	tool := func(args ...string) ([]byte, error) {
		cmd := exec.CommandContext(ctx, "go", args...)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH="+arch)
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		out, err := cmd.Output()
		if err != nil {
			err = fmt.Errorf("GOARCH=%s go %s: %w\n%s", arch, strings.Join(args, " "), err, &stderr)
		}
		return out, err
	}
	out, err := tool(append([]string{"list", "-f", "{{if or .TestGoFiles .XTestGoFiles}}{{.ImportPath}}{{end}}"}, m.args...)...)
	if err != nil {
		return err
	}
	var built []binary
	for pkg := range strings.FieldsSeq(string(out)) {
		name := strings.TrimPrefix(strings.TrimPrefix(pkg, m.module), "/")
		if isExcluded(name) {
			continue
		}
		if name == "" {
			name = "."
		}
		file := filepath.Join(m.dir, fmt.Sprintf("%s-%d.test", arch, len(built)))
		// Without debugging information the guest has less to load.
		if _, err := tool("test", "-c", "-ldflags=-w", "-o", file, pkg); err != nil {
			return err
		}
		built = append(built, binary{name, file})
	}
	if len(built) == 0 {
		return fmt.Errorf("no tests in %s", strings.Join(m.args, " "))
	}
	m.built[arch] = built
	return nil
}

func isExcluded(name string) bool {
	for _, dir := range excluded {
		if name == dir || strings.HasPrefix(name, dir+"/") {
			return true
		}
	}
	return false
}

// A console gives the guest's output to the program that runs.
type console struct {
	to    *output
	other output // what comes when none does
	tee   io.Writer
}

func (c *console) Write(p []byte) (int, error) {
	if c.tee != nil {
		c.tee.Write(bytes.ReplaceAll(p, []byte{marker}, nil))
	}
	if c.to != nil {
		return c.to.Write(p)
	}
	return c.other.Write(p)
}
