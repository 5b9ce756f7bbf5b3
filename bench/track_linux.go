package main

import (
	"fmt"
	"strings"
	"time"

	"github.com/go-uffd/uffd"
	"github.com/go-uffd/uffd/track"
)

// trackWorkloads are those of the table of tracking.
func trackWorkloads(quick bool) []*workload {
	gib, rounds := 1<<18, 20
	if quick {
		gib, rounds = 1<<13, 2
	}
	tracked := func(features uffd.Features, args ...string) []string {
		return with([]string{"tracked", fmt.Sprint("features=", uint64(features))}, args...)
	}
	pages := func(n int) string { return fmt.Sprint("pages=", n) }
	// both are the two programs that track.
	both := func(handlerMeasures bool, args ...string) []server {
		return []server{
			{name: "C", handler: with([]string{"tracker"}, args...), tracks: handlerMeasures},
			{name: "track", handler: with([]string{"go", "tracker"}, args...), tracks: handlerMeasures},
		}
	}
	add := func(all []*workload, w workload) []*workload {
		w.tracking = true
		for i := range w.servers {
			w.servers[i].client = w.client
		}
		w.clientCPUs = one
		return append(all, &w)
	}
	var all []*workload
	// Who collects is free to use other processors: Go's threads would be in each
	// other's way on one. The process whose memory it is sleeps meanwhile, and has one
	// thread: else those of its processors that are busy would have to be told of each
	// page that is protected, which takes longer than all the rest.
	for _, part := range []int{1, 100, 1000} {
		arg := fmt.Sprint("part=", part)
		rounds := rounds
		if part == 1000 {
			rounds = min(rounds, 6) // to write to all takes long
		}
		all = add(all, workload{
			name: fmt.Sprint("collect-", part), title: fmt.Sprintf("Collect 1 GiB, %g %% written", float64(part)/10), turns: 15,
			client: tracked(uffd.FeatureWPAsync, pages(gib), arg),
			servers: with(both(true, arg, fmt.Sprint("rounds=", rounds)), server{name: "Pagemap.Scan",
				handler: []string{"go", "tracker", arg, fmt.Sprint("rounds=", rounds), "scan=1"}, tracks: true})})
	}
	all = add(all, workload{name: "start", title: "Start tracking 1 GiB", turns: 15,
		client: tracked(uffd.FeatureWPAsync, pages(gib)), servers: both(true, "rounds=0")})
	all = add(all, workload{name: "write", title: "Write to a page, not tracked", turns: 15,
		client: tracked(0, pages(gib/8)), servers: []server{{name: "no handler"}}})
	all = add(all, workload{name: "write-async", title: "First write, WP_ASYNC", handlerCPUs: one, turns: 15,
		client: tracked(uffd.FeatureWPAsync, pages(gib/8)), servers: both(false)})
	all = add(all, workload{name: "write-sync", title: "First write, sync", handlerCPUs: one, turns: 15,
		client:  tracked(uffd.FeaturePagefaultFlagWP, pages(gib/8)),
		servers: both(false, "sync=1")})
	gap := "gap=100000"
	if quick {
		gap = "gap=1000"
	}
	all = add(all, workload{name: "snapshot", title: "Snapshot of 1 GiB", turns: 15, snapshot: true,
		client:  tracked(track.SnapshotFeatures, pages(gib), gap),
		servers: []server{{name: "track", handler: []string{"go", "tracker", "snapshot=1"}, tracks: true}}})
	return all
}

// trackTable prints what was measured of tracking.
func trackTable(b *strings.Builder, f *file, all []*workload) {
	b.WriteString("\n| | | median | ratio |\n|---|---|---|---|\n")
	for _, w := range all {
		r := f.find(w.name)
		if r == nil || !w.tracking {
			continue
		}
		title, values := w.title, latencies[0].of
		if w.snapshot {
			values = func(s sample) float64 { return float64(s.Nanoseconds) }
		}
		for i, s := range w.servers {
			ratio := ""
			if i > 0 {
				ratio = r.ratios(s.name, w.servers[0].name, values).String()
			}
			fmt.Fprintf(b, "| %s | %s | %s | %s |\n", title, s.name, duration(r.values(s.name, values).median), ratio)
			title = ""
		}
		if !w.snapshot {
			continue
		}
		for _, more := range []struct {
			title string
			of    func(sample) float64
		}{
			{"— its start", func(s sample) float64 { return float64(s.Arming) }},
			{"— a write that waits, mean", func(s sample) float64 { return float64(s.P50) }},
			{"— the longest", func(s sample) float64 { return float64(s.Longest) }},
		} {
			fmt.Fprintf(b, "| %s | | %s | |\n", more.title, duration(r.values(w.servers[0].name, more.of).median))
		}
	}
}

// duration prints nanoseconds with three digits.
func duration(ns float64) string {
	d := time.Duration(ns)
	for unit := time.Nanosecond; ; unit *= 10 {
		if d < 1000*unit {
			return d.Round(unit).String()
		}
	}
}
