package lazymem_test

import (
	"fmt"
	"log"
	"os"
	"regexp"

	"github.com/go-uffd/uffd/lazymem"
	"github.com/go-uffd/uffd/source"
)

// Search a file of which only the beginning is read, as far as the search goes.
func Example() {
	file, err := os.Open("/var/log/big.log")
	if err != nil {
		log.Fatal(err)
	}
	defer file.Close()
	info, err := file.Stat()
	if err != nil {
		log.Fatal(err)
	}
	m, err := lazymem.New(source.FromReaderAt(file, info.Size()), nil)
	if err != nil {
		log.Fatal(err)
	}
	defer m.Close()

	failure := regexp.MustCompile(`status=5\d\d .*`)
	var found string
	err = m.Do(func(mem []byte) error {
		found = string(failure.Find(mem)) // a copy: mem is good until the function returns
		return nil
	})
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(found)
}
