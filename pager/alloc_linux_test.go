package pager_test

import (
	"testing"

	"github.com/go-uffd/uffd"
	"github.com/go-uffd/uffd/internal/uffdtest"
	"github.com/go-uffd/uffd/pager"
	"github.com/go-uffd/uffd/source"
)

// A fault whose bytes are in memory costs no allocation and no goroutine.
func TestNoAllocation(t *testing.T) {
	const faults = 2000
	for name, contents := range map[string]source.Source{
		"lent":             source.FromBytes(make([]byte, faults*pageSize)),
		"zeros":            source.Zero(faults * int64(pageSize)),
		"zeros, protected": source.Zero(faults * int64(pageSize)),
	} {
		t.Run(name, func(t *testing.T) {
			proc := uffdtest.Start(t)
			mem, f := mapped(t, proc, uffdtest.Anon, faults)
			r := region(mem, contents)
			if name == "zeros, protected" {
				uffdtest.Require(t, uffd.FeaturePagefaultFlagWP)
				register(t, f, mem.Range, uffd.RegisterMissing|uffd.RegisterWP)
				r.BeforeWrite = func(uffd.Range) {}
			}
			s := serve(t, proc, f, &pager.Pager{FaultAround: 1}, r)
			s.holds(t, mem, 0, 0)
			// Each run touches pages of its own.
			part := mem
			part.Len = mem.Len / 4
			touch := func() {
				s.Touch(part).Value()
				part.Start = part.End()
			}
			perTouch := testing.AllocsPerRun(1, touch) // of the test's own request, plus that of 500 faults
			if perTouch > 100 {
				t.Errorf("%v allocations for 500 faults", perTouch)
			}
			if n := s.client.Stats(); n.Missing < faults/2 || n.Reads != 0 {
				t.Errorf("%d faults, %d reads by workers", n.Missing, n.Reads)
			}
		})
	}
}
