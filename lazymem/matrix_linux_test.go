package lazymem_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"hash/crc32"
	"os"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/go-uffd/uffd"
	"github.com/go-uffd/uffd/internal/uffdtest"
	"github.com/go-uffd/uffd/lazymem"
	"github.com/go-uffd/uffd/source"
)

// The matrix shows that nothing makes lazymem hang which makes a process hang
// that serves its own faults by messages: 16 goroutines fault in all sorts of
// code, at several GOMAXPROCS, while the world is stopped over and over. Each
// cell is a process of its own, because a hang cannot be ended otherwise.

var matrixPage = flag.String("matrix", "",
	"TestMatrix: run all of it, with a handler goroutine for comparison, and write the table to this `file` (takes minutes)")

// A cell is what one child does.
type cell struct {
	Engine   string // "lazymem", or "messages" for a handler goroutine
	Procs    int
	Pressure string
	Access   string // a name in accesses, or "" for all
	Rounds   int
	NoSignal bool // GODEBUG=asyncpreemptoff=1
}

var pressures = []string{"none", "gc", "stw", "alloc"}

const (
	matrixPages   = 64
	matrixWorkers = 16
)

// An access looks at mem and computes something. Those of different workers do
// not write to the same pages.
type access struct {
	name string
	f    func(mem []byte, worker int) any
}

var accesses = []access{
	{"load", func(mem []byte, worker int) any {
		sum := 0
		for i := range matrixPages {
			sum += int(mem[(i+worker*4)%matrixPages*pageSize+worker]) * (i + 1)
		}
		return sum
	}},
	{"store", func(mem []byte, worker int) any {
		own := ownPages(mem, worker)
		for i := range own {
			own[i] = byte(i + worker)
		}
		return crc32.ChecksumIEEE(own)
	}},
	{"copy", func(mem []byte, worker int) any {
		p := make([]byte, len(mem))
		n := copy(p, mem[worker*pageSize:])
		copy(p[n:], mem)
		return crc32.ChecksumIEEE(p)
	}},
	{"bytes.Equal", func(mem []byte, worker int) any {
		half := len(mem) / 2
		return bytes.Equal(mem[:half], mem[half:])
	}},
	{"map", func(mem []byte, worker int) any {
		found := make(map[string]int)
		for i := range matrixPages {
			at := (i + worker*4) % matrixPages * pageSize
			found[string(mem[at:at+100])]++
		}
		return len(found)
	}},
	{"sha256", func(mem []byte, worker int) any { return sha256.Sum256(mem[worker*pageSize:]) }},
	{"sort", func(mem []byte, worker int) any {
		own := ownPages(mem, worker)
		slices.Sort(own)
		return crc32.ChecksumIEEE(own)
	}},
	{"encoding/binary", func(mem []byte, worker int) any {
		var sum uint64
		for at := worker * pageSize; at < len(mem); at += 512 {
			var v struct {
				A uint32
				B uint64
			}
			binary.Decode(mem[at:], binary.BigEndian, &v)
			sum += v.B + uint64(v.A) + binary.LittleEndian.Uint64(mem[at+16:])
		}
		return sum
	}},
	{"regexp", func(mem []byte, worker int) any {
		return fmt.Sprint(needle.FindIndex(mem[worker*pageSize:]))
	}},
}

var needle = regexp.MustCompile(`n[e]{2}dle [0-9]+!`)

var pageSize = os.Getpagesize()

func ownPages(mem []byte, worker int) []byte {
	const pages = matrixPages / matrixWorkers
	return mem[worker*pages*pageSize:][:pages*pageSize]
}

// pattern returns n bytes in which all pages differ, with a needle near the end.
func pattern(n int) []byte {
	data := make([]byte, n)
	x := uint32(1)
	for i := range data {
		x = x*1664525 + 1013904223
		data[i] = byte(x >> 24)
	}
	if n > 100 {
		copy(data[n-100:], "needle 42!")
	}
	return data
}

func matrixChild() error {
	var c cell
	if err := json.Unmarshal([]byte(os.Getenv("LAZYMEM_TEST_CELL")), &c); err != nil {
		return err
	}
	runtime.GOMAXPROCS(c.Procs)
	data := pattern(matrixPages * pageSize)
	src := &countingSource{Source: source.FromReaderAt(bytes.NewReader(data), int64(len(data)))}
	src.allocate = c.Pressure == "alloc"
	var e engine
	var err error
	if c.Engine == "messages" {
		e, err = newMessages(src)
	} else {
		e, err = newLazy(src)
	}
	if err != nil {
		return err
	}
	go func() {
		for c.Pressure == "gc" {
			runtime.GC()
		}
		for c.Pressure == "stw" {
			var s runtime.MemStats
			runtime.ReadMemStats(&s)
		}
	}()
	for _, a := range accesses {
		if c.Access != "" && c.Access != a.name {
			continue
		}
		var want [matrixWorkers]any
		for w := range want {
			want[w] = a.f(bytes.Clone(data), w)
		}
		for range c.Rounds {
			if err := e.empty(); err != nil {
				return err
			}
			var group sync.WaitGroup
			var got [matrixWorkers]any
			var errs [matrixWorkers]error
			for w := range matrixWorkers {
				group.Go(func() {
					errs[w] = e.do(func(mem []byte) error {
						got[w] = a.f(mem, w)
						return nil
					})
				})
			}
			group.Wait()
			if err := errors.Join(errs[:]...); err != nil {
				return fmt.Errorf("%s: %w", a.name, err)
			}
			if got != want {
				return fmt.Errorf("%s: got %v, want %v", a.name, got, want)
			}
			if _, err := fmt.Println(a.name, src.reads.Load()); err != nil {
				return err
			}
		}
	}
	return nil
}

// An engine is memory that fills itself.
type engine interface {
	empty() error
	do(func(mem []byte) error) error
}

type lazyEngine struct{ *lazymem.Memory }

func newLazy(src source.Source) (engine, error) {
	m, err := lazymem.New(src, &lazymem.Config{Window: 1})
	return lazyEngine{m}, err
}

func (e lazyEngine) empty() error                      { return e.Discard(0, e.Size()) }
func (e lazyEngine) do(f func(mem []byte) error) error { return e.Do(f) }

// messages is what lazymem is not: memory whose faults a goroutine of the same
// process serves.
type messages struct{ mem []byte }

func newMessages(src source.Source) (engine, error) {
	mem, err := unix.Mmap(-1, 0, int(src.Size()), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, err
	}
	f, err := uffd.New(nil)
	if err != nil {
		return nil, err
	}
	r := uffd.RangeOf(mem)
	if _, err := f.Register(r, uffd.RegisterMissing); err != nil {
		return nil, err
	}
	go func() {
		msgs, page := make([]uffd.Msg, 16), make([]byte, pageSize)
		for {
			n, err := f.ReadMsgs(msgs)
			for i := range msgs[:n] {
				fault, _ := msgs[i].Pagefault()
				at := fault.Addr &^ uffd.Addr(pageSize-1)
				if err == nil {
					err = source.Read(context.Background(), src, page, int64(at-r.Start))
				}
				if err == nil {
					_, err = f.Copy(at, page, 0)
				}
				if errors.Is(err, unix.EEXIST) {
					err = f.Wake(uffd.Range{Start: at, Len: uint64(pageSize)})
				}
			}
			if err != nil {
				panic(err)
			}
		}
	}()
	return messages{mem}, nil
}

func (e messages) empty() error                      { return unix.Madvise(e.mem, unix.MADV_DONTNEED) }
func (e messages) do(f func(mem []byte) error) error { return f(e.mem) }

// run runs the cell and returns how many reads of the source it took, or
// errHang if a round takes longer than patience.
func (c cell) run(patience time.Duration) (reads string, err error) {
	encoded, err := json.Marshal(c)
	if err != nil {
		return "", err
	}
	cmd := child("matrix", "LAZYMEM_TEST_CELL="+string(encoded))
	if c.NoSignal {
		cmd.Env = append(cmd.Env, "GODEBUG=asyncpreemptoff=1")
	}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return "", err
	}
	if err := cmd.Start(); err != nil {
		return "", err
	}
	hang := time.AfterFunc(patience, func() { cmd.Process.Kill() })
	rounds := make(map[string]int)
	for lines := bufio.NewScanner(stdout); lines.Scan() && hang.Reset(patience); {
		var name string
		name, reads, _ = strings.Cut(lines.Text(), " ")
		rounds[name]++
	}
	err = cmd.Wait()
	if !hang.Stop() {
		return "", fmt.Errorf("rounds done: %v: %w", rounds, errHang)
	}
	for _, a := range accesses {
		if err == nil && rounds[a.name] != c.Rounds && (c.Access == "" || c.Access == a.name) {
			err = fmt.Errorf("%d rounds of %s done, want %d", rounds[a.name], a.name, c.Rounds)
		}
	}
	if err != nil {
		return "", fmt.Errorf("%w\n%s", err, stderr.Bytes())
	}
	return reads, nil
}

var errHang = errors.New("hang")

func TestMatrix(t *testing.T) {
	full := *matrixPage != ""
	rounds, off := 2, []bool{false}
	if full {
		rounds, off = 30, []bool{false, true}
	}
	for _, noSignal := range off {
		for _, procs := range matrixProcs {
			for _, pressure := range pressures {
				c := cell{Engine: "lazymem", Procs: procs, Pressure: pressure, Rounds: rounds, NoSignal: noSignal}
				reads, err := c.run(uffdtest.Patience)
				if err != nil {
					t.Errorf("%+v: %v", c, err)
				}
				t.Logf("GOMAXPROCS=%d, %s, asyncpreemptoff=%t: %s reads", procs, pressure, noSignal, reads)
			}
		}
	}
	if !full {
		return
	}
	table := compare(t)
	if t.Failed() {
		return // the page would not be true
	}
	major, minor := uffdtest.Kernel()
	page := fmt.Sprintf(matrixText, major, minor, runtime.GOARCH, runtime.NumCPU(), runtime.Version(),
		matrixWorkers, matrixPages, comparePatience, compareRounds, rounds, table)
	if err := os.WriteFile(*matrixPage, []byte(page), 0o644); err != nil {
		t.Fatal(err)
	}
}

var matrixProcs = []int{1, 2, 4}

const (
	compareRounds   = 10
	comparePatience = 4 * time.Second
)

// matrixText is the page that has the table.
const matrixText = `# Deadlocks

What becomes of a process that touches memory which it fills itself. Made by

    go test ./lazymem -run '^TestMatrix$' -timeout 30m -args -matrix ../docs/deadlocks.md

on Linux %d.%d, %s, %d CPUs, with %s. In each cell %d goroutines at once go through %d missing pages, in the
code that is named on the left, with a GOMAXPROCS of 1, 2 or 4, while

- none: nothing else happens,
- gc: a goroutine runs the collector in a loop,
- stw: a goroutine stops the world in a loop, by runtime.ReadMemStats,
- alloc: the source allocates 2 MiB in each read.

A hang is one of %[9]d rounds that takes more than %[8]s.

With package lazymem: every cell is ok, in %[10]d rounds each, and again with GODEBUG=asyncpreemptoff=1.

With a handler goroutine in the same process, which waits in Go's poller:

%[11]s`

// compare returns a table of which cells hang with a handler goroutine.
func compare(t *testing.T) string {
	uffdtest.RequireUserFaults(t)
	var table, rule strings.Builder
	table.WriteString("| |")
	rule.WriteString("|---|")
	for _, procs := range matrixProcs {
		for _, pressure := range pressures {
			fmt.Fprintf(&table, " %d %s |", procs, pressure)
			rule.WriteString("---|")
		}
	}
	fmt.Fprintf(&table, "\n%s\n", &rule)
	hangs := 0
	for _, a := range accesses {
		fmt.Fprintf(&table, "| %s |", a.name)
		for _, procs := range matrixProcs {
			for _, pressure := range pressures {
				c := cell{Engine: "messages", Procs: procs, Pressure: pressure, Access: a.name, Rounds: compareRounds}
				switch _, err := c.run(comparePatience); {
				case errors.Is(err, errHang):
					table.WriteString(" hang |")
					hangs++
				case err != nil:
					t.Errorf("%+v: %v", c, err)
				default:
					table.WriteString(" ok |")
				}
			}
		}
		table.WriteString("\n")
	}
	if hangs == 0 {
		t.Error("no hang with a handler goroutine: the matrix would not notice one")
	}
	return table.String()
}
