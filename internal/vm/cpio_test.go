package vm

import (
	"bytes"
	"fmt"
	"io"
	"strconv"
	"strings"
	"testing"
)

// readArchive takes an archive apart as the kernel does, and says what is in
// it, a line an entry.
func readArchive(t *testing.T, data []byte) []string {
	t.Helper()
	var entries []string
	seen := make(map[uint64]bool)
	for len(data) > 0 {
		if string(data[:6]) != "070701" {
			t.Fatalf("magic %q after %q", data[:6], entries)
		}
		var fields [13]uint64
		for i := range fields {
			n, err := strconv.ParseUint(string(data[6+8*i:14+8*i]), 16, 32)
			if err != nil {
				t.Fatal(err)
			}
			fields[i] = n
		}
		ino, mode, size, major, minor, nameSize := fields[0], fields[1], int(fields[6]), fields[9], fields[10], int(fields[11])
		name := data[110 : 110+nameSize]
		if name[nameSize-1] != 0 {
			t.Fatalf("name %q has no end", name)
		}
		start := (110 + nameSize + 3) &^ 3
		content := data[start : start+size]
		data = data[(start+size+3)&^3:]
		if string(name[:nameSize-1]) == "TRAILER!!!" {
			if len(data) > 0 {
				t.Fatalf("%d bytes after the end", len(data))
			}
			return entries
		}
		if seen[ino] {
			t.Fatalf("%s has the inode number of another", name)
		}
		seen[ino] = true
		entries = append(entries, fmt.Sprintf("%s %o %d:%d %q", name[:nameSize-1], mode, major, minor, content))
	}
	t.Fatal("no trailer")
	return nil
}

func TestArchive(t *testing.T) {
	var b bytes.Buffer
	a := newArchive(&b)
	a.dir("tmp", 0o1777)
	a.char("dev/console", 0o600, 5, 1)
	for i := range 4 { // every padding
		a.file("src/"+strings.Repeat("n", i+1), 0o644, []byte("1234"[:i]))
	}
	a.file("src/deep/er/x", 0o755, []byte("#!"))
	if err := a.close(); err != nil {
		t.Fatal(err)
	}
	got := strings.Join(readArchive(t, b.Bytes()), "\n")
	want := strings.Join([]string{
		`tmp 41777 0:0 ""`,
		`dev 40755 0:0 ""`,
		`dev/console 20600 5:1 ""`,
		`src 40755 0:0 ""`,
		`src/n 100644 0:0 ""`,
		`src/nn 100644 0:0 "1"`,
		`src/nnn 100644 0:0 "12"`,
		`src/nnnn 100644 0:0 "123"`,
		`src/deep 40755 0:0 ""`,
		`src/deep/er 40755 0:0 ""`,
		`src/deep/er/x 100755 0:0 "#!"`,
	}, "\n")
	if got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}

func TestArchiveError(t *testing.T) {
	a := newArchive(failingWriter{})
	a.file("large", 0o644, make([]byte, 2<<20))
	a.file("next", 0o644, nil)
	if err := a.close(); err != io.ErrShortWrite {
		t.Errorf("close: %v, want the writer's error", err)
	}
}

type failingWriter struct{}

func (failingWriter) Write([]byte) (int, error) { return 0, io.ErrShortWrite }
