// Command lazyslice searches a compressed log as if it were in memory.
//
// It writes a log to a file, compressed in chunks that can be unpacked one by
// one, and makes a []byte of it that is unpacked where somebody looks:
// bytes.Index and regexp do not know. It prints how much had to be unpacked, and
// fails if they found something else than in the log itself, or if all of it was
// unpacked.
package main

import (
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"log"
	"os"
	"regexp"
	"sync/atomic"

	"github.com/go-uffd/uffd/lazymem"
	"github.com/go-uffd/uffd/source"
)

func main() {
	log.SetFlags(0)
	log.SetPrefix("lazyslice: ")
	if err := run(os.Stdout); err != nil {
		log.Fatal(err)
	}
}

const (
	logSize   = 32 << 20
	chunkSize = 64 << 10
)

func run(out io.Writer) error {
	text := makeLog(logSize)
	file, err := os.CreateTemp("", "lazyslice")
	if err != nil {
		return err
	}
	defer os.Remove(file.Name())
	defer file.Close()
	packed, err := pack(file, text)
	if err != nil {
		return err
	}
	fmt.Fprintf(out, "%d bytes of log, packed to %d\n", len(text), packed.starts[len(packed.starts)-1])

	m, err := lazymem.New(source.FromReaderAt(packed, packed.size), nil)
	if err != nil {
		return err
	}
	defer m.Close()

	// One line out of the middle.
	line := make([]byte, lineSize)
	off := int64(len(text) / 2 / lineSize * lineSize)
	if _, err := m.ReadAt(line, off); err != nil {
		return err
	}
	if !bytes.Equal(line, text[off:off+lineSize]) {
		return fmt.Errorf("%q is not the line at %d", line, off)
	}
	fmt.Fprintf(out, "a line at %d: %d bytes unpacked\n", off, packed.unpacked.Load())

	// A request, which is somewhere in the first eighth.
	request := []byte(fmt.Sprintf("request=%08d", len(text)/lineSize/9))
	var at int
	err = m.Do(func(mem []byte) error {
		at = bytes.Index(mem, request)
		return nil
	})
	if err != nil {
		return err
	}
	if want := bytes.Index(text, request); at != want {
		return fmt.Errorf("bytes.Index = %d, want %d", at, want)
	}
	fmt.Fprintf(out, "%s at %d: %d bytes unpacked\n", request, at, packed.unpacked.Load())

	// The first failure after it. What leaves Do is a copy.
	failure := regexp.MustCompile(`request=\d+ status=5\d\d`)
	var found []byte
	err = m.Do(func(mem []byte) error {
		found = bytes.Clone(failure.Find(mem[at:]))
		return nil
	})
	if err != nil {
		return err
	}
	if want := failure.Find(text[at:]); !bytes.Equal(found, want) {
		return fmt.Errorf("regexp found %q, want %q", found, want)
	}
	unpacked := packed.unpacked.Load()
	fmt.Fprintf(out, "%s: %d bytes unpacked\n", found, unpacked)
	fmt.Fprintf(out, "%d%% of the log were needed\n", unpacked*100/packed.size)
	if unpacked > packed.size/2 {
		return errors.New("that is too much for what was looked at")
	}
	return nil
}

const lineSize = 64

// makeLog returns a log in which one request, at an eighth of it, fails.
func makeLog(size int) []byte {
	text := make([]byte, 0, size)
	for i := range size / lineSize {
		status := 200
		if i == size/lineSize/8 {
			status = 503
		}
		n := len(text)
		text = fmt.Appendf(text, "request=%08d status=%d item=%x", i, status, uint32(i)*2654435761)
		text = append(text, bytes.Repeat([]byte(" "), lineSize-1-(len(text)-n))...)
		text = append(text, '\n')
	}
	return text
}

// A chunked file consists of gzip files, each of chunkSize bytes unpacked.
type chunked struct {
	file     io.ReaderAt
	starts   []int64 // of the chunks, and the end of the last
	size     int64   // unpacked
	unpacked atomic.Int64
}

// pack writes text to file.
func pack(file *os.File, text []byte) (*chunked, error) {
	c := &chunked{file: file, size: int64(len(text)), starts: []int64{0}}
	var buf bytes.Buffer
	for ; len(text) > 0; text = text[min(chunkSize, len(text)):] {
		z := gzip.NewWriter(&buf)
		z.Write(text[:min(chunkSize, len(text))])
		if err := z.Close(); err != nil {
			return nil, err
		}
		c.starts = append(c.starts, int64(buf.Len()))
	}
	_, err := file.Write(buf.Bytes())
	return c, err
}

// ReadAt unpacks the chunks that p needs.
func (c *chunked) ReadAt(p []byte, off int64) (n int, err error) {
	for n < len(p) && off < c.size {
		chunk, err := c.chunk(off / chunkSize)
		if err != nil {
			return n, err
		}
		copied := copy(p[n:], chunk[off%chunkSize:])
		n += copied
		off += int64(copied)
	}
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// chunk unpacks chunk i.
func (c *chunked) chunk(i int64) ([]byte, error) {
	z, err := gzip.NewReader(io.NewSectionReader(c.file, c.starts[i], c.starts[i+1]-c.starts[i]))
	if err != nil {
		return nil, err
	}
	chunk, err := io.ReadAll(z)
	c.unpacked.Add(int64(len(chunk)))
	if err == nil && int64(len(chunk)) != min(chunkSize, c.size-i*chunkSize) {
		err = fmt.Errorf("chunk %d has %d bytes", i, len(chunk))
	}
	return chunk, err
}
