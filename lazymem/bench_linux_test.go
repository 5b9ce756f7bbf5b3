package lazymem_test

import (
	"fmt"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/go-uffd/uffd/lazymem"
	"github.com/go-uffd/uffd/source"
)

const (
	benchSize   = 32 << 20
	benchRounds = 3
)

// BenchmarkAgainstC measures alternately a C program that resolves its faults in
// the signal handler, and this package, each in its own way of access. It needs
// gcc. The metrics named like "fault/C" are the medians of the rounds' ratios.
func BenchmarkAgainstC(b *testing.B) {
	program := filepath.Join(b.TempDir(), "sigbus")
	out, err := exec.Command("gcc", "-O2", "-o", program, "testdata/sigbus.c").CombinedOutput()
	if err != nil {
		b.Fatalf("gcc: %v\n%s", err, out)
	}
	data := make([]byte, benchSize)
	for i := range data {
		data[i] = byte(i/4096 + 1)
	}
	ratios := make(map[string][]float64)
	note := func(name string, x float64) { ratios[name] = append(ratios[name], x) }
	for b.Loop() {
		var fault, speed, resident float64 // ns, MB/s, ns
		out, err := exec.Command(program, fmt.Sprint(benchSize), fmt.Sprint(64<<10), fmt.Sprint(benchRounds)).Output()
		if err == nil {
			_, err = fmt.Sscan(string(out), &fault, &speed, &resident)
		}
		if err != nil {
			b.Fatalf("the C program: %v", err)
		}
		note("C-fault-ns", fault)
		note("fault/C", faultTime(b, data)/fault)
		note("C-sequential-MB/s", speed)
		note("sequential/C", sequentialSpeed(b, data, readAtAll)/speed)
		note("sequentialDo/C", sequentialSpeed(b, data, doAll)/speed)
		plain, readAt, do := residentTimes(b, data)
		note("C-resident-ns", resident)
		note("residentReadAt/copy", readAt/plain)
		note("residentDo/copy", do/plain)
	}
	for name, list := range ratios {
		slices.Sort(list)
		b.ReportMetric(list[len(list)/2], name)
	}
	b.ReportMetric(0, "ns/op")
}

func newMemory(b *testing.B, data []byte, c *lazymem.Config) *lazymem.Memory {
	b.Helper()
	m, err := lazymem.New(source.FromBytes(data), c)
	if err != nil {
		b.Fatal(err)
	}
	return m
}

func check(b *testing.B, err error) {
	b.Helper()
	if err != nil {
		b.Fatal(err)
	}
}

// faultTime returns the median time of a Do that faults once.
func faultTime(b *testing.B, data []byte) float64 {
	m := newMemory(b, data, &lazymem.Config{Window: 1})
	defer m.Close()
	const pages = benchSize / 4096
	took := make([]time.Duration, 0, pages*benchRounds)
	for range benchRounds {
		check(b, m.Discard(0, m.Size()))
		for i := range pages {
			p := i * 613 % pages
			var c byte
			start := time.Now()
			err := m.Do(func(mem []byte) error {
				c = mem[p*4096]
				return nil
			})
			took = append(took, time.Since(start))
			if err != nil || c != byte(p+1) {
				b.Fatalf("page %d has %d, %v", p, c, err)
			}
		}
	}
	slices.Sort(took)
	return float64(took[len(took)/2])
}

// sequentialSpeed returns the best speed, in MB/s, at which read gets through
// the memory with the default window.
func sequentialSpeed(b *testing.B, data []byte, read func(*lazymem.Memory, []byte) error) float64 {
	m := newMemory(b, data, nil)
	defer m.Close()
	page := make([]byte, 4096)
	best := time.Hour
	for range benchRounds {
		check(b, m.Discard(0, m.Size()))
		start := time.Now()
		check(b, read(m, page))
		best = min(best, time.Since(start))
	}
	return benchSize / 1e6 / best.Seconds()
}

func readAtAll(m *lazymem.Memory, page []byte) error {
	for off := int64(0); off < m.Size(); off += int64(len(page)) {
		if _, err := m.ReadAt(page, off); err != nil {
			return err
		}
	}
	return nil
}

func doAll(m *lazymem.Memory, page []byte) error {
	return m.Do(func(mem []byte) error {
		for ; len(mem) > 0; mem = mem[len(page):] {
			copy(page, mem)
		}
		return nil
	})
}

// residentTimes returns the times, in ns, to copy 4 KiB that are there: plainly,
// with ReadAt, with Do.
func residentTimes(b *testing.B, data []byte) (plain, readAt, do float64) {
	m := newMemory(b, data[:64*4096], nil)
	defer m.Close()
	check(b, m.Populate(b.Context(), 0, m.Size(), nil))
	mem, err := m.Bytes()
	check(b, err)
	page := make([]byte, 4096)
	ways := []func(off int){
		func(off int) { copy(page, mem[off:]) },
		func(off int) { m.ReadAt(page, int64(off)) },
		func(off int) {
			m.Do(func(mem []byte) error {
				copy(page, mem[off:])
				return nil
			})
		},
	}
	const n = 100_000
	best := []time.Duration{time.Hour, time.Hour, time.Hour}
	for range 5 * benchRounds { // by turns
		for way, f := range ways {
			start := time.Now()
			for i := range n {
				f(i % 64 * 4096)
			}
			best[way] = min(best[way], time.Since(start))
		}
	}
	return float64(best[0]) / n, float64(best[1]) / n, float64(best[2]) / n
}
