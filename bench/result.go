package main

import (
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"slices"
)

// A sample is one turn: latencies in nanoseconds; Count is of faults or bytes. Of a
// snapshot, P50 is the mean time that a write waited.
type sample struct {
	Count, Nanoseconds      uint64
	P50, P99, P999, Longest uint64
	Arming                  uint64 `json:",omitempty"` // how long it took to protect a snapshot's memory
}

// rate is in things per second.
func (s sample) rate() float64 { return float64(s.Count) / float64(s.Nanoseconds) * 1e9 }

// results are those of a workload, by server. Samples with the same index are of
// the same turn.
type results struct {
	Name    string
	Samples map[string][]sample
}

// A spread is the median of some numbers, and between what half of them lie.
type spread struct{ low, median, high float64 }

func spreadOf(numbers []float64) spread {
	sorted := slices.Sorted(slices.Values(numbers))
	at := func(q float64) float64 {
		x := q * float64(len(sorted)-1)
		i := int(x)
		if i+1 == len(sorted) {
			return sorted[i]
		}
		return sorted[i] + (x-float64(i))*(sorted[i+1]-sorted[i])
	}
	return spread{at(0.25), at(0.5), at(0.75)}
}

// values are a server's numbers.
func (r *results) values(server string, of func(sample) float64) spread {
	var numbers []float64
	for _, s := range r.Samples[server] {
		numbers = append(numbers, of(s))
	}
	return spreadOf(numbers)
}

// ratios compares a server with another, turn by turn.
func (r *results) ratios(server, reference string, of func(sample) float64) spread {
	var numbers []float64
	for turn, s := range r.Samples[server] {
		numbers = append(numbers, of(s)/of(r.Samples[reference][turn]))
	}
	return spreadOf(numbers)
}

// A file keeps results.
type file struct {
	Machine   string
	Stress    string // what stress-ng says
	Workloads []*results
}

func (f *file) find(name string) *results {
	for _, r := range f.Workloads {
		if r.Name == name {
			return r
		}
	}
	return nil
}

// put keeps results, in place of older ones.
func (f *file) put(r *results) {
	if old := f.find(r.Name); old != nil {
		*old = *r
		return
	}
	f.Workloads = append(f.Workloads, r)
}

func readFile(name string) (*file, error) {
	f := new(file)
	content, err := os.ReadFile(name)
	if errors.Is(err, fs.ErrNotExist) {
		return f, nil
	}
	if err != nil {
		return nil, err
	}
	return f, json.Unmarshal(content, f)
}

func (f *file) write(name string) error {
	content, err := json.Marshal(f)
	if err != nil {
		return err
	}
	return os.WriteFile(name, append(content, '\n'), 0o644)
}
