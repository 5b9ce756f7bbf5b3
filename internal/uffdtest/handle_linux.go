package uffdtest

import (
	"bufio"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/go-uffd/uffd"
)

// handlers has the requests of the test package, by name.
var handlers = make(map[string]func(args []uint64) ([]uint64, error))

// Handle defines what a Process does on [Process.Run]. Call it while the package
// is initialized: the Process runs the same program.
func Handle(name string, do func(args []uint64) ([]uint64, error)) bool {
	handlers[name] = do
	return true
}

// Run makes a request that was defined with [Handle], with up to six arguments.
func (p *Process) Run(name string, args ...uint64) *Call { return p.start(name, nil, args...) }

// BytesAt is the memory of the faulting process at a, for functions given to
// [Handle].
func BytesAt(a, n uint64) []byte { return bytesAt(a, n) }

// Values is Value for calls that give more than one.
func (c *Call) Values() []uint64 {
	c.p.t.Helper()
	v, err := c.Result()
	if err != nil {
		c.p.t.Fatalf("%s: %v", c.what, err)
	}
	return v
}

// OpenReadOnly opens the file of m once more.
func (p *Process) OpenReadOnly(m Memory) int {
	p.t.Helper()
	return int(p.start("open-read-only", nil, uint64(m.FD)).Value())
}

// smaps returns what /proc/PID/smaps says of the mapping at a.
func (p *Process) smaps(a uffd.Addr, field string) string {
	p.t.Helper()
	f, err := os.Open(fmt.Sprintf("/proc/%d/smaps", p.Pid))
	if err != nil {
		p.t.Fatal(err)
	}
	defer f.Close()
	here := false
	for lines := bufio.NewScanner(f); lines.Scan(); {
		name, value, _ := strings.Cut(lines.Text(), " ")
		var start, end uint64
		if n, _ := fmt.Sscanf(name, "%x-%x", &start, &end); n == 2 {
			here = start <= uint64(a) && uint64(a) < end
		} else if here && name == field+":" {
			return strings.TrimSpace(value)
		}
	}
	p.t.Fatalf("smaps has no %s for %v", field, a)
	return ""
}

// Smaps returns a number, in bytes, from what smaps says of the mapping at a.
func (p *Process) Smaps(a uffd.Addr, field string) uint64 {
	p.t.Helper()
	var kib uint64
	fmt.Sscan(p.smaps(a, field), &kib)
	return kib << 10
}

// VMFlags returns the mapping's flags in smaps, like "rd wr mr".
func (p *Process) VMFlags(a uffd.Addr) string {
	p.t.Helper()
	return p.smaps(a, "VmFlags")
}

// RequireEventFork skips t unless the user may ask for FeatureEventFork.
func RequireEventFork(t testing.TB) {
	t.Helper()
	f, err := uffd.New(&uffd.Config{Require: uffd.FeatureEventFork})
	if err != nil {
		skipForbidden(t, err, "permission for fork events (CAP_SYS_PTRACE)")
	}
	f.Close()
}

// RequireTHP returns the size of transparent huge pages, and skips t where there
// are none, or where they are too large for a test.
func RequireTHP(t testing.TB) uint64 {
	t.Helper()
	const dir = "/sys/kernel/mm/transparent_hugepage/"
	enabled, err := os.ReadFile(dir + "enabled")
	if err != nil || strings.Contains(string(enabled), "[never]") {
		skip(t, "transparent huge pages")
	}
	var size uint64
	text, _ := os.ReadFile(dir + "hpage_pmd_size")
	fmt.Sscan(string(text), &size)
	if size == 0 || size > 32<<20 {
		skip(t, "transparent huge pages of at most 32 MiB (have %d bytes)", size)
	}
	return size
}
