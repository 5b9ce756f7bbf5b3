package main

import (
	"bytes"
	"fmt"
	"os"
	"strings"
)

const (
	tableBegin = "<!-- bench: measured -->\n"
	tableEnd   = "<!-- end -->\n"
)

var latencies = []struct {
	name string
	of   func(sample) float64
}{
	{"p50", func(s sample) float64 { return float64(s.P50) }},
	{"p99", func(s sample) float64 { return float64(s.P99) }},
	{"p99.9", func(s sample) float64 { return float64(s.P999) }},
}

// tables prints what was measured as Markdown.
func tables(f *file, all []*workload) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s.\n\n", f.Machine)
	b.WriteString("| | | faults/s | p50 | p99 | p99.9 |\n|---|---|---|---|---|---|\n")
	for _, w := range all {
		if r := f.find(w.name); r != nil && !w.bandwidth && !w.tracking {
			w.faultRows(&b, r)
		}
	}
	b.WriteString("\n| | | GiB/s |\n|---|---|---|\n")
	for _, w := range all {
		if r := f.find(w.name); r != nil && w.bandwidth {
			w.bandwidthRows(&b, r)
		}
	}
	trackTable(&b, f, all)
	if f.Stress != "" {
		fmt.Fprintf(&b, "\n`%s`: %s.\n", stressCommand, f.Stress)
	}
	return b.String()
}

func (w *workload) faultRows(b *strings.Builder, r *results) {
	reference := w.servers[0].name
	title := w.title
	for i, s := range w.servers {
		if len(r.Samples[s.name]) == 0 {
			continue
		}
		fmt.Fprintf(b, "| %s | %s |", title, s.name)
		title = ""
		switch {
		case w.sparse:
			b.WriteString(" |")
		case i == 0:
			fmt.Fprintf(b, " %.0f |", r.values(s.name, sample.rate).median)
		default:
			fmt.Fprintf(b, " %v |", r.ratios(s.name, reference, sample.rate))
		}
		for _, l := range latencies {
			switch {
			case l.name == "p99.9" && r.Samples[s.name][0].Count < 2000: // two faults are no quantile
				b.WriteString(" |")
			case i == 0:
				fmt.Fprintf(b, " %.1f µs |", r.values(s.name, l.of).median/1000)
			default:
				fmt.Fprintf(b, " %v |", r.ratios(s.name, reference, l.of))
			}
		}
		b.WriteString("\n")
	}
}

func (w *workload) bandwidthRows(b *strings.Builder, r *results) {
	reference := w.servers[0].name
	title := w.title
	for i, s := range w.servers {
		if len(r.Samples[s.name]) == 0 {
			continue
		}
		fmt.Fprintf(b, "| %s | %s |", title, s.name)
		title = ""
		if i == 0 {
			fmt.Fprintf(b, " %.2f |\n", r.values(s.name, w.gibPerSecond).median)
		} else {
			fmt.Fprintf(b, " %v |\n", r.ratios(s.name, reference, w.gibPerSecond))
		}
	}
}

// gibPerSecond is the bandwidth of a sample that counts bytes, or pages.
func (w *workload) gibPerSecond(s sample) float64 {
	if w.countsPages {
		return s.rate() * 4096 / (1 << 30)
	}
	return s.rate() / (1 << 30)
}

func (s spread) String() string { return fmt.Sprintf("%.2f (%.2f–%.2f)", s.median, s.low, s.high) }

// replaceTables puts tables into a file, between the marks.
func replaceTables(name, tables string) error {
	content, err := os.ReadFile(name)
	if err != nil {
		return err
	}
	before, rest, ok := bytes.Cut(content, []byte(tableBegin))
	if !ok {
		return fmt.Errorf("%s has no %q", name, tableBegin)
	}
	_, after, ok := bytes.Cut(rest, []byte(tableEnd))
	if !ok {
		return fmt.Errorf("%s has no %q", name, tableEnd)
	}
	content = fmt.Appendf(nil, "%s%s%s%s%s", before, tableBegin, tables, tableEnd, after)
	return os.WriteFile(name, content, 0o644)
}
