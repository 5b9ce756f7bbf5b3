package uffd_test

import (
	"testing"

	"github.com/go-uffd/uffd"
	"github.com/go-uffd/uffd/internal/uffdtest"
)

// demonstrations say whether the running kernel has a bug.
var demonstrations = map[*uffdtest.Bug]func(*testing.T) bool{
	uffdtest.FalseWP: func(t *testing.T) bool {
		requireOffer(t, uffd.FeaturePagefaultFlagWP)
		p := uffdtest.Start(t)
		mem := p.Map(uffdtest.Anon, 1)
		f := p.Open(nil)
		p.Fill(mem.Range, 1).Value()
		register(t, f, mem.Range, uffd.RegisterWP)
		protect(t, f, mem.Range, uffd.WriteProtectWP)
		store := p.Store(mem.Start, 2)
		for !store.Done() {
			if waiting(t, f) > 0 {
				protect(t, f, mem.Range, 0)
				store.Value()
				return false
			}
		}
		return true
	},
	uffdtest.FalseAPI: func(t *testing.T) bool {
		offered, err := uffd.Probe()
		if err != nil {
			t.Fatal(err)
		}
		if offered.Has(uffd.FeaturePagefaultFlagWP) {
			return false
		}
		return rawAPI(rawOpen(t), 0xaa, uffd.FeaturePagefaultFlagWP) == 0
	},
	uffdtest.PageForExact: func(t *testing.T) bool {
		requireExactAddress(t)
		p := uffdtest.Start(t)
		mem := p.Map(uffdtest.Anon, 1)
		f := p.Open(&uffd.Config{Require: uffd.FeatureExactAddress})
		register(t, f, mem.Range, uffd.RegisterMissing)
		load := p.Load(mem.Start + 17)
		fault := nextFault(t, f, mem.Range, 0)
		fill(t, f, mem.Kind, mem.Range, 1, 0)
		load.Value()
		return fault.Addr != mem.Start+17
	},
	uffdtest.MoveOnShmem: func(t *testing.T) bool {
		requireOffer(t, uffd.FeatureMove)
		p := uffdtest.Start(t)
		to, from := p.Map(uffdtest.Shmem, 1), p.Map(uffdtest.Anon, 1)
		f := p.Open(nil)
		p.Fill(from.Range, 1).Value()
		offered := register(t, f, to.Range, uffd.RegisterMissing).Has(uffd.IoctlMove)
		_, err := p.Move(to.Start, from.Range, 0).Result()
		return offered && err != nil
	},
	uffdtest.SetModeWithoutRWP: func(t *testing.T) bool {
		f, err := uffd.Open(uffd.BestFaults)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		offered, ioctls, err := f.API(0)
		if err != nil {
			t.Fatal(err)
		}
		return ioctls.Has(uffd.IoctlSetMode) && !offered.Has(uffd.FeatureRWP)
	},
}

// requireOffer is uffdtest.Require without regard to known bugs.
func requireOffer(t *testing.T, want uffd.Features) {
	t.Helper()
	offered, err := uffd.Probe()
	if err != nil {
		t.Fatal(err)
	}
	if !offered.Has(want) {
		uffdtest.Require(t, want)
	}
}

// TestKnownBugs has each kernel show the bugs that it is listed with, and no
// others. A bug that is gone has to leave the list, with what avoids it.
func TestKnownBugs(t *testing.T) {
	for _, b := range uffdtest.Bugs {
		shows := demonstrations[b]
		if b.Fatal || b.Rare {
			if shows != nil {
				t.Errorf("cannot be asserted: %s", b.What)
			}
			continue
		}
		t.Run(b.What, func(t *testing.T) {
			if got, want := shows(t), b.Here(); got != want {
				t.Errorf("the kernel shows the bug: %v; the list says %v", got, want)
			}
		})
	}
}
