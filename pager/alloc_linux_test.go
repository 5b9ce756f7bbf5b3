package pager_test

import (
	"context"
	"strings"
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
		"lent, state":      source.FromBytes(make([]byte, faults*pageSize)),
		"lent, shared":     source.FromBytes(make([]byte, faults*pageSize)),
		"lent, protected":  source.FromBytes(make([]byte, faults*pageSize)),
		"zeros":            source.Zero(faults * int64(pageSize)),
		"zeros, protected": source.Zero(faults * int64(pageSize)),
	} {
		t.Run(name, func(t *testing.T) {
			kind, mode := uffdtest.Anon, uffd.RegisterMissing
			protected := strings.Contains(name, "protected")
			if protected {
				uffdtest.Require(t, uffd.FeaturePagefaultFlagWP)
				mode |= uffd.RegisterWP
			}
			shared := strings.Contains(name, "shared")
			if shared {
				uffdtest.Require(t, uffd.FeatureMinorShmem)
				kind, mode = uffdtest.Shmem, mode|uffd.RegisterMinor
			}
			proc := uffdtest.Start(t)
			mem := proc.Map(kind, faults)
			f := proc.Open(events)
			register(t, f, mem.Range, mode)
			r := region(mem, contents)
			if protected {
				r.BeforeWrite = func(uffd.Range) {}
			}
			if shared {
				r.Memory = attachMemory(t, proc, mem)
			}
			p := &pager.Pager{FaultAround: 1}
			s := &served{Process: proc, pager: p, file: f}
			var err error
			if strings.Contains(name, "state") {
				state, stateErr := pager.NewState()
				if stateErr != nil {
					t.Fatal(stateErr)
				}
				defer state.Close()
				s.client, err = p.AttachState(f, state, r)
			} else {
				s.client, err = p.Attach(f, r)
			}
			if err != nil {
				t.Fatal(err)
			}
			go s.client.Serve(context.Background())
			defer s.client.Close()
			s.holds(t, mem, 0, 0)
			// Each run touches pages of its own.
			part := mem
			part.Len = mem.Len / 4
			touch := func() {
				if protected {
					s.Fill(part.Range, 1).Value()
				} else {
					s.Touch(part).Value()
				}
				part.Start = part.End()
			}
			perTouch := testing.AllocsPerRun(1, touch) // of the test's own request, plus that of 500 faults
			if perTouch > 100 {
				t.Errorf("%v allocations for 500 faults", perTouch)
			}
			n := s.client.Stats()
			if n.Missing+n.Minor < faults/2 || n.Reads != 0 {
				t.Errorf("%d faults, %d reads by workers", n.Missing+n.Minor, n.Reads)
			}
			if protected && n.Unlocked < faults/2 {
				t.Errorf("%d pages unlocked", n.Unlocked)
			}
		})
	}
}
