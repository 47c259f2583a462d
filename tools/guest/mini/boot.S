# Multiboot 1 entry: 32-bit protected mode, paging off, interrupts off, and so it
# stays, unless the guest is to idle: then the timer's is let in while it halts. KVM on
# hosts that emulate part of the instruction set (nested ones, for instance) fails on
# iret, which nothing here needs.
	.section .multiboot, "a"
	.align	4
	.long	0x1badb002, 3, -(0x1badb002 + 3)	# page-aligned modules, memory sizes

	.text
	.globl	_start
_start:
	movl	$stack_end, %esp
	lgdt	gdt_register
	ljmp	$8, $1f
1:	movw	$16, %cx
	movw	%cx, %ds
	movw	%cx, %es
	movw	%cx, %ss
	movw	%cx, %fs
	movw	%cx, %gs
	pushl	%ebx		# struct multiboot_info *
	pushl	%eax		# the loader's magic number
	call	mini_main
2:	cli
	hlt
	jmp	2b

# The timer's interrupt, which only ends a halt. It returns with interrupts off, as they
# were before: nothing of the flags that the processor saved is wanted back.
	.globl	on_timer
on_timer:
	pushl	%eax
	movb	$0x20, %al	# end of interrupt
	outb	%al, $0x20
	popl	%eax
	ret	$8		# over code segment and flags

	.data
	.align	8
gdt:	.quad	0
	.quad	0x00cf9a000000ffff	# code, 4 GiB flat
	.quad	0x00cf92000000ffff	# data, 4 GiB flat
gdt_register:
	.word	gdt_register - gdt - 1
	.long	gdt

	.bss
	.align	16
	.skip	32768
stack_end:

	.section .note.GNU-stack, "", @progbits
