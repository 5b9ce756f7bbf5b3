package main

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/go-uffd/uffd/internal/uffdtest"
	"github.com/go-uffd/uffd/pager"
)

func TestMain(m *testing.M) {
	pager.ProcessMain(openImage)
	if len(os.Args) > 1 {
		child(os.Args[1], os.Args[2:])
	}
	uffdtest.Main(m)
}

// Everything works, the clients find the contents that they should, and the tables
// and the plot have it all.
func TestQuick(t *testing.T) {
	uffdtest.RequireRoot(t)
	dir := t.TempDir()
	page := filepath.Join(dir, "performance.md")
	if err := os.WriteFile(page, []byte("before\n"+tableBegin+"old\n"+tableEnd+"after\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	o := &options{run: regexp.MustCompile(""), quick: true, results: filepath.Join(dir, "results.json"), docs: dir}
	if _, err := o.measure(t.Context()); err != nil {
		t.Fatal(err)
	}
	content, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	text := string(content)
	if !strings.HasPrefix(text, "before\n"+tableBegin) || !strings.HasSuffix(text, tableEnd+"after\n") || strings.Contains(text, "old") {
		t.Errorf("the page is not what it should be:\n%s", text)
	}
	f, err := readFile(o.results)
	if err != nil {
		t.Fatal(err)
	}
	for _, w := range append(workloads(true), trackWorkloads(true)...) {
		if !strings.Contains(text, "| "+w.title+" | "+w.servers[0].name+" |") {
			t.Errorf("the page has no %q:\n%s", w.title, text)
		}
		r := f.find(w.name)
		if r == nil {
			t.Errorf("no results of %q", w.name)
			continue
		}
		for _, s := range w.servers {
			checkSamples(t, w, s.name, r.Samples[s.name])
		}
	}
	plot, err := os.ReadFile(filepath.Join(dir, "performance.svg"))
	if err != nil || !strings.Contains(string(plot), "</svg>") || !strings.Contains(string(plot), "hugetlb") {
		t.Errorf("the plot, %v: %.100s", err, plot)
	}
}

func checkSamples(t *testing.T, w *workload, server string, samples []sample) {
	if len(samples) != 1 {
		t.Errorf("%s, %s: %d samples, want 1", w.name, server, len(samples))
	}
	for _, s := range samples {
		ordered := s.P50 <= s.P99 && s.P99 <= s.P999 && s.P999 <= s.Longest && s.Longest <= s.Nanoseconds
		if s.Count == 0 || s.Nanoseconds == 0 || !ordered || !w.bandwidth && s.P50 == 0 {
			t.Errorf("%s, %s: %+v", w.name, server, s)
		}
	}
}

func TestSpread(t *testing.T) {
	if s := spreadOf([]float64{5, 1, 4, 2, 3}); s != (spread{2, 3, 4}) {
		t.Errorf("of 1…5: %+v", s)
	}
	if s := spreadOf([]float64{1, 2}); s != (spread{1.25, 1.5, 1.75}) {
		t.Errorf("of 1, 2: %+v", s)
	}
	r := &results{Samples: map[string][]sample{"a": {{P50: 10}, {P50: 30}}, "b": {{P50: 5}, {P50: 10}}}}
	if s := r.ratios("a", "b", latencies[0].of); s != (spread{2.25, 2.5, 2.75}) {
		t.Errorf("of the ratios 2, 3: %+v", s)
	}
}
