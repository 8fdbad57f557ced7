/* Starts the second processor: `second_start()` wakes it up, and it calls `second_main` at privilege level 3, on a stack of
 * its own, with no way to any port. What it begins with is copied to where it wakes up, in real mode. */
#include "long-mode.inc"
.section .text
.code64
.globl second_begin, second_end
second_begin:
.code16
    cli
    mov %cs, %ax
    mov %ax, %ds
    lgdtl second_gdt_pointer - second_begin
    mov %cr0, %eax
    or $1, %eax
    mov %eax, %cr0
    ljmpl $8, $(0x8000 + second_32 - second_begin)
.code32
second_32:
    mov $0x10, %eax
    mov %eax, %ds
    mov %eax, %es
    mov %eax, %ss
    enter_long_mode
    ljmp $0x18, $second_64
    .balign 8
second_gdt:
    .quad 0
    .quad 0x00cf9b000000ffff
    .quad 0x00cf93000000ffff
    .quad 0x00af9b000000ffff
    .quad 0x00cff3000000ffff
    .quad 0x00affb000000ffff
second_gdt_pointer:
    .word second_gdt_pointer - second_gdt - 1
    .long 0x8000 + second_gdt - second_begin
second_end:
.code64
second_64:
    mov $second_stack_top, %esp
    push $0x23              /* ss, rsp, flags, cs, rip */
    push $second_stack_top
    push $2
    push $0x2b
    lea 1f(%rip), %rax
    push %rax
    iretq
1:  call second_main
2:  jmp 2b

.section .bss, "aw", @nobits
    .balign 4096
.globl second_stack, second_stack_top
second_stack:
    .fill 32768
second_stack_top:
.section .note.GNU-stack, "", @progbits
